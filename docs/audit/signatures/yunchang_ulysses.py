"""UlyssesAttention of yunchang, over flash_attn_here: audit with --launcher torchrun, contiguous, 1 or 2 ranks.

It deals heads, so there are no more ranks than key heads, of which the questions have two. In float16 or bfloat16.
"""

import flash_attn_here

flash_attn_here.install()

ACCEPTS = "causal", "grouped", "window", "scale", "softcap"
LIBRARY = "torch"
NAMES = {"scale": "softmax_scale", "window": "window_size"}


def attention(function, q, k, v, *, ring_size, ring=None, **keywords):
    named = {NAMES.get(name, name): x for name, x in keywords.items()}
    return function(ring)(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), **named).transpose(1, 2)
