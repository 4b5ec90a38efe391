"""The basic ring of yunchang over its AttnType.TORCH_EFFICIENT: audit with --launcher torchrun, --no-gradients.

torch has that operator for GPUs alone; for tensors on the CPU a dense one stands in for it here, whose lse is float32
like the operator's own. What yunchang makes of its results is its own. The README says that it has no backward.
"""

import torch

ACCEPTS = "causal", "scale"
LIBRARY = "torch"


def efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale):
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return (torch.exp(scores - lse[..., None]) @ v.float()).to(q.dtype), lse, None, None


def attention(function, q, k, v, *, ring_size, ring=None, causal=False, scale=None):
    import yunchang.kernels.attention as theirs
    from yunchang.kernels import AttnType

    if not q.is_cuda:
        theirs._scaled_dot_product_efficient_attention = efficient
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = function(q, k, v, causal=causal, softmax_scale=scale, group=ring, attn_type=AttnType.TORCH_EFFICIENT)
    return out.transpose(1, 2)
