"""The dilated attentions of DarcStar's dilated-attention-pytorch, which is not that of the index: --length 24."""

import inspect

ACCEPTS = ("causal", "dilated")
LIBRARY = "torch"


def attention(function, q, k, v, *, ring_size, segment_lengths=None, dilation_rates=None, causal=False):
    branches = list(segment_lengths or [q.shape[2]]), list(dilation_rates or [1])
    takes = inspect.signature(function).parameters
    if "config" in takes:
        from dilated_attention_pytorch import RingAttentionConfig

        module = function(RingAttentionConfig(*branches, ring_size=ring_size, mixed_precision=False))
    else:
        module = function(*branches, **({"ring_size": ring_size} if "ring_size" in takes else {}))
    return module(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)
