"""The basic ring of yunchang over its own AttnType.TORCH_MATH, which needs no flash_attn and runs on the CPU.

Audit yunchang:ring_flash_attn_func with --launcher torchrun, contiguous, --no-gradients: it says that it has none.
"""

ACCEPTS = "causal", "scale"
LIBRARY = "torch"


def attention(function, q, k, v, *, ring_size, ring=None, causal=False, scale=None):
    from yunchang.kernels import AttnType

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = function(q, k, v, causal=causal, softmax_scale=scale, group=ring, attn_type=AttnType.TORCH_MATH)
    return out.transpose(1, 2)
