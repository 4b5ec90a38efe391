"""Torch's two operators of FlashAttention-2, which have kernels for GPUs alone, as dense attention on the CPU."""

from itertools import pairwise

import torch


def install():
    """Make them run on the CPU, causal or whole; they do so as long as what this returns is kept."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library


def scores_of(q, k, causal, scale, left, right):
    """q [B, S, H, D] and k [B, T, H, D] to scores [B, H, S, T] in float64."""
    if (left, right) != (None, None):
        raise NotImplementedError("windows")
    scores = torch.einsum("bshd,bthd->bhst", q.double(), k.double()) * scale
    if causal:
        rows, columns = scores.shape[2:]
        scores.masked_fill_(torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows).logical_not(), -torch.inf)
    return scores


def sequences(sides):
    """Of arrays whose sequences lie end to end, those of each sequence, as a batch of one."""
    cut = [[x[None, a:b] for a, b in pairwise(starts.tolist())] for x, starts in sides]
    return zip(*cut, strict=True)


def forward(
    q, k, v, q_starts, k_starts, q_length, k_length, dropout, causal, debug, *,
    scale=None, window_size_left=None, window_size_right=None, **_,
):  # fmt: skip
    keywords = {"scale": scale, "window_size_left": window_size_left, "window_size_right": window_size_right}
    if q_starts is not None:
        parts = [
            forward(*x, None, None, q_length, k_length, dropout, causal, debug, **keywords)
            for x in sequences(((q, q_starts), (k, k_starts), (v, k_starts)))
        ]
        return torch.cat([x[0][0] for x in parts]), torch.cat([x[1][0] for x in parts], 1), *parts[0][2:]
    scores = scores_of(q, k, causal, scale, window_size_left, window_size_right)
    out = torch.einsum("bhst,bthe->bshe", torch.softmax(scores, -1), v.double()).to(q.dtype)
    state = torch.zeros(2, dtype=torch.int64)
    return out, torch.logsumexp(scores, -1).float(), state, state, q.new_empty(0)


def backward(
    dout, q, k, v, out, lse, q_starts, k_starts, q_length, k_length, dropout, causal, state, unused, *,
    scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    keywords = {"scale": scale, "window_size_left": window_size_left, "window_size_right": window_size_right}
    if q_starts is not None:
        sides = (dout, q_starts), (q, q_starts), (k, k_starts), (v, k_starts), (out, q_starts), (lse.T, q_starts)
        parts = [
            backward(*x, lse.mT, None, None, q_length, k_length, dropout, causal, state, unused, **keywords)
            for *x, lse in sequences(sides)
        ]
        return tuple(torch.cat([x[place][0] for x in parts]) for place in range(3))
    weights = torch.exp(scores_of(q, k, causal, scale, window_size_left, window_size_right) - lse.double()[..., None])
    dweights = torch.einsum("bshe,bthe->bhst", dout.double(), v.double())
    delta = torch.einsum("bshe,bshe->bhs", dout.double(), out.double())
    dscores = weights * (dweights - delta[..., None]) * scale
    found = (
        torch.einsum("bhst,bthd->bshd", dscores, k.double()),
        torch.einsum("bhst,bshd->bthd", dscores, q.double()),
        torch.einsum("bhst,bshe->bthe", weights, dout.double()),
    )
    return tuple(x.to(q.dtype) for x in found)
