"""torch's own context_parallel around scaled_dot_product_attention: audit with --launcher torchrun, contiguous.

As documented it is given whole arrays and cuts them itself: shards are gathered, run inside it, put together again by
context_parallel_unshard, and this rank's rows come back. Backward runs inside it too. BALANCED says whether it may cut
from head and tail, which its rings refuse where attention is not causal: "causal" does so where it is asked for.
"""

import os
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental._attention import context_parallel_unshard
from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options

ACCEPTS = "causal", "grouped", "scale"
LIBRARY = "torch"
BALANCED = os.environ.get("BALANCED", "causal")


def attention(function, q, k, v, *, ring_size, causal=False, scale=None, **joined):
    named = {"is_causal": causal, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    _cp_options.enable_load_balance = {"yes": True, "no": False, "causal": causal}[BALANCED]
    return _Rows.apply(function, named, q, k, v)


@cache
def mesh(device):
    return init_device_mesh(device, (dist.get_world_size(),))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, named, *shards):
        ctx.function, ctx.named = function, named
        ctx.save_for_backward(*shards)
        return _run(function, named, shards)[0]

    @staticmethod
    def backward(ctx, dout):
        return None, None, *_run(ctx.function, ctx.named, ctx.saved_tensors, dout)[1:]


def _run(function, named, shards, dout=None):
    """This rank's rows of out, and with dout of the gradients."""
    buffers = [_gathered(x) for x in (shards if dout is None else (*shards, dout))]
    ranks = mesh(buffers[0].device.type)
    with function(ranks, buffers=buffers, buffer_seq_dims=[2] * len(buffers), no_restore_buffers=set(buffers)):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(dout is not None) for x in buffers[:3]]
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, **named)
        parts = [out.detach()] if dout is None else [out.detach(), *torch.autograd.grad(out, leaves, buffers[3])]
        whole = context_parallel_unshard(ranks, parts, [2] * len(parts))
    return [x.chunk(dist.get_world_size(), 2)[dist.get_rank()].contiguous() for x in whole]


def _gathered(x):
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 2)
