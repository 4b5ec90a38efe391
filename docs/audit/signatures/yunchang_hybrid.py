"""LongContextAttention of yunchang, over flash_attn_here: audit with --launcher torchrun, contiguous, 2 or 4 ranks.

Ulysses over pairs of ranks, the basic ring over as many pairs as there are. In float16 or bfloat16.
"""

from functools import cache

import flash_attn_here
import torch.distributed as dist

flash_attn_here.install()

ACCEPTS = "causal", "grouped", "window", "scale", "softcap"
LIBRARY = "torch"
NAMES = {"scale": "softmax_scale", "window": "window_size"}


@cache
def layer(function, ring_size):
    from yunchang import set_seq_parallel_pg

    set_seq_parallel_pg(2, ring_size // 2, dist.get_rank(), ring_size)
    return function(ring_impl_type="basic")


def attention(function, q, k, v, *, ring_size, **keywords):
    named = {NAMES.get(name, name): x for name, x in keywords.items() if name != "ring"}
    whole = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return layer(function, ring_size)(*whole, **named).transpose(1, 2)
