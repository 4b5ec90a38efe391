"""The batch rings of ring-flash-attn, over flash_attn_here: audit with --launcher torchrun, in float16 or bfloat16.

ring_flash_attn_func goes with --layout contiguous, zigzag_ring_flash_attn_func with zigzag, stripe_flash_attn_func with
striped; the last two refuse attention that is not causal. They take window_size, which the README says is unsupported:
without --only causal,grouped,scale it is asked all the same.
"""

import flash_attn_here

flash_attn_here.install()

ACCEPTS = "causal", "grouped", "window", "scale"
LIBRARY = "torch"
NAMES = {"scale": "softmax_scale", "window": "window_size"}


def attention(function, q, k, v, *, ring_size, ring=None, **keywords):
    named = {NAMES.get(name, name): x for name, x in keywords.items()}
    return function(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), group=ring, **named).transpose(1, 2)
