"""What context-parallel packages call of flash_attn 2, as dense float32 attention on the CPU, for audits.

After install() such a package is imported, unmodified, over this module in the place of flash_attn. Nothing here is
fast, and nothing is flash_attn's own code; it keeps to what flash_attn 2 does where rings can tell: float16 and
bfloat16 alone; causal and window_size counted from the lower right corner; natural lse, float32, [B, H, S] or packed
[H, S]; out 0 and lse +inf in rows that see no key; dq, dk and dv written into memory that the caller gives, in its
dtype. It has neither dropout nor alibi.
"""

import sys
from itertools import pairwise

import torch

__version__ = "2.8.3"  # the release whose arguments the functions take


def _sees(queries, keys, causal, left, right):
    """Which query sees which key [S, N]; a bound below 0 is none."""
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - (keys - queries)
    right = 0 if causal else right
    sees = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        sees &= ahead >= -left
    return sees & (ahead <= right) if right >= 0 else sees


def _scores(q, k, scale, causal, left, right, softcap):
    """Scores [B, H, S, N] of q [B, S, H, D] and k [B, N, Hk, D], -inf where hidden, and their slope by the softcap."""
    k = k.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores, slope = torch.einsum("bshd,bnhd->bhsn", q.float(), k) * scale, 1.0
    if softcap:
        turned = torch.tanh(scores / softcap)
        scores, slope = softcap * turned, 1 - turned**2
    return scores.masked_fill(~_sees(q.shape[1], k.shape[1], causal, left, right), -torch.inf), slope


def _refuse(q, dropout_p, alibi_slopes):
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if dropout_p or alibi_slopes is not None:
        raise NotImplementedError("flash_attn_on_cpu has neither dropout nor alibi")


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    """out [B, S, H, D], lse [B, H, S], and two that nobody reads."""
    _refuse(q, dropout_p, alibi_slopes)
    scores, _ = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right, softcap)
    lse = torch.logsumexp(scores, -1)
    lse = torch.where(torch.isneginf(lse), torch.inf, lse)
    v = v.float().repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhsn,bnhd->bshd", torch.exp(scores - lse[..., None]), v).to(q.dtype), lse, None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    """Fills dq, dk and dv from out and lse as they are given, which need not be those of k and v alone."""
    _refuse(q, dropout_p, alibi_slopes)
    scores, slope = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right, softcap)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.float().repeat_interleave(group, dim=2) for x in (k, v))
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    weights = torch.exp(scores - softmax_lse[..., None])
    gained = weights * (torch.einsum("bshd,bnhd->bhsn", dout.float(), values) - delta) * slope * softmax_scale
    dq.copy_(torch.einsum("bhsn,bnhd->bshd", gained, keys))
    dk.copy_(torch.einsum("bhsn,bshd->bnhd", gained, q.float()).unflatten(2, (-1, group)).sum(3))
    dv.copy_(torch.einsum("bhsn,bshd->bnhd", weights, dout.float()).unflatten(2, (-1, group)).sum(3))
    return delta


def _parts(*ends):
    """Slices of each packed sequence, of queries and of keys."""
    ends = [x.tolist() for x in ends]
    return [[slice(a, b) for a, b in pairwise(x)] for x in ends]


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    """The same of sequences end to end: out [S, H, D] and lse [H, S]."""
    options = (
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax,
    )  # fmt: skip
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), torch.inf)
    for rows, columns in zip(*_parts(cu_seqlens_q, cu_seqlens_k), strict=True):
        some, its, *_ = _flash_attn_forward(q[None, rows], k[None, columns], v[None, columns], *options)
        out[rows], lse[:, rows] = some[0], its[0]
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    deterministic=False, rng_state=None,
):  # fmt: skip
    """The same of sequences end to end."""
    options = (
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    )  # fmt: skip
    for rows, columns in zip(*_parts(cu_seqlens_q, cu_seqlens_k), strict=True):
        given = dout[None, rows], q[None, rows], k[None, columns], v[None, columns], out[None, rows]
        into = dq[None, rows], dk[None, columns], dv[None, columns]
        _flash_attn_backward(*given, softmax_lse[None, :, rows], *into, *options)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Attention with gradients, of [B, S, H, D]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Attention.apply(q, k, v, (dropout_p, scale, causal, *window_size, softcap, alibi_slopes))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse, *_ = _flash_attn_forward(q, k, v, *options, False)
        ctx.options = options
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        found = [torch.empty_like(x) for x in ctx.saved_tensors[:3]]
        _flash_attn_backward(dout, *ctx.saved_tensors, *found, *ctx.options, False)
        return *found, None


def install():
    """Be flash_attn for what is imported from now on."""
    here = sys.modules[__name__]
    sys.modules |= {"flash_attn": here, "flash_attn.flash_attn_interface": here}
