"""UlyssesAttention of yunchang over its AttnType.TORCH_EFFICIENT: audit with --launcher torchrun, --no-gradients.

It deals heads, so there are no more ranks than key heads, of which the questions have two. torch has the operator that
it calls for GPUs alone; a dense one stands in for it here.
"""

import torch

ACCEPTS = "causal", "scale"
LIBRARY = "torch"


def flash(q, k, v, dropout_p, is_causal, scale):
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return (torch.exp(scores - lse[..., None]) @ v.float()).to(q.dtype), lse


def attention(function, q, k, v, *, ring_size, ring=None, causal=False, scale=None):
    import yunchang.kernels.attention as theirs
    from yunchang.kernels import AttnType

    theirs._scaled_dot_product_flash_attention = flash
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = function(ring, attn_type=AttnType.TORCH_EFFICIENT)(q, k, v, causal=causal, softmax_scale=scale)
    return out.transpose(1, 2)
