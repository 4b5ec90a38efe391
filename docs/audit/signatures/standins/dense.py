"""Attention of q, k and v [B, S, H, D] and its log-sum-exp, by plain Torch: what stands in for GPU kernels."""

import torch


def dense(q, k, v, causal=False, scale=None):
    """out [B, S, H, D], lse [B, H, S]; causal from the lower right corner, as flash_attn has it since 2.1."""
    scores = torch.einsum("bshd,bthd->bhst", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        rows, columns = scores.shape[-2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if not scores.shape[-1]:  # flash_attn gives zeros, and lse that is +inf, where there are no keys
        nothing = (k.sum() + v.sum()) * 0  # so that gradients go on to k and v, empty as they are
        return q * 0 + nothing, scores.new_full(scores.shape[:-1], float("inf"))
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)
