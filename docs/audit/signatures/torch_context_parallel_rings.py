"""The ring beneath torch's context_parallel, over torch's flash attention for the CPU: audit with --launcher torchrun.

context_parallel itself has no ring for the CPU's operator, so the ring is called here as it calls it for the GPU's:
audit torch.distributed.tensor.experimental._context_parallel._attention:_templated_ring_attention. With --layout zigzag
and BALANCED=yes in the environment causal attention is balanced, which is its default; with --layout contiguous and
BALANCED=no it is not. ROTATE is allgather, its default, or alltoall.
"""

import os

import torch
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.distributed.tensor.experimental._context_parallel import _attention

ACCEPTS = "causal", "scale"
LIBRARY = "torch"
BALANCED = os.environ.get("BALANCED", "yes") == "yes"
set_rotate_method(os.environ.get("ROTATE", "allgather"))
aten = torch.ops.aten


def attention(function, q, k, v, *, ring_size, ring=None, causal=False, scale=None):
    _attention._cp_options.enable_load_balance = BALANCED and causal  # it refuses to balance anything else
    return _Ring.apply(function, ring, {"is_causal": causal, "dropout_p": 0.0, "scale": scale}, q, k, v)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, ring, options, q, k, v):
        out, lse = function(ring, 2, aten._scaled_dot_product_flash_attention_for_cpu, q, k, v, **options)
        ctx.ring, ctx.options = ring, options
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        found = _attention._templated_ring_attention_backward(
            ctx.ring, 2, aten._scaled_dot_product_flash_attention_for_cpu_backward, dout, "grad_out",
            *ctx.saved_tensors, **ctx.options,
        )  # fmt: skip
        return None, None, None, *found
