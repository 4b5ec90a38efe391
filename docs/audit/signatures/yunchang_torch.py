"""The basic ring of yunchang over an AttnType that needs no flash_attn: TORCH_MATH, or what ATTN_TYPE says.

Audit yunchang:ring_flash_attn_func with --launcher torchrun, contiguous, --no-gradients: it says that it has none.
TORCH_CUDNN is for GPUs.
"""

import os

ACCEPTS = "causal", "scale"
LIBRARY = "torch"


def attention(function, q, k, v, *, ring_size, ring=None, causal=False, scale=None):
    from yunchang.kernels import AttnType

    kind = AttnType[os.environ.get("ATTN_TYPE", "TORCH_MATH")]
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = function(q, k, v, causal=causal, softmax_scale=scale, group=ring, attn_type=kind)
    return out.transpose(1, 2)
