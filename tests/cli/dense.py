"""Whole-array attention in float64, written query by query: what the command must have computed."""

import math

import numpy as np


def dense(
    q, k, v, *, causal=False, window=(None, None), scale=None, softcap=None, bias=None, mask=None,
    query_offset=0, key_lengths=None, dilated=(), block=False,
):  # fmt: skip
    """out [B, H, S, E] and lse [B, H, S]; q, k, v as [B, H, S, D]."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    (batch, heads, rows, width), keys = q.shape, k.shape[2]
    group = heads // k.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if isinstance(window, int):
        window = (window - 1, 0)
    out, lse = np.zeros((batch, heads, rows, v.shape[3])), np.full((batch, heads, rows), -np.inf)
    whole = (batch, heads, rows, keys)
    bias = np.zeros(whole) if bias is None else np.broadcast_to(np.asarray(bias).astype(np.float64), whole)
    mask = np.ones(whole, bool) if mask is None else np.broadcast_to(mask, whole)
    for b, h, i in np.ndindex(batch, heads, rows):
        position = i + (query_offset if isinstance(query_offset, int) else query_offset[b])
        last = keys if key_lengths is None else key_lengths[b]
        seen = [
            j
            for j in range(last)
            if mask[b, h, i, j]
            and bias[b, h, i, j] > -np.inf
            and not (causal and j > position)
            and (window[0] is None or position - j <= window[0])
            and (window[1] is None or j - position <= window[1])
        ]
        times = np.ones(len(seen))
        if dilated:
            offsets = [(w, r, h // -(-heads // r) if block else h % r) for w, r in dilated]
            times = [
                sum(i // w == j // w and (i % w) % r == (j % w) % r == offset for w, r, offset in offsets) for j in seen
            ]
            seen, times = [j for j, m in zip(seen, times, strict=True) if m], np.array([m for m in times if m])
        if not seen:
            continue
        scores = k[b, h // group, seen] @ q[b, h, i] * scale
        if softcap is not None:
            scores = np.tanh(scores / softcap) * softcap
        scores = scores + bias[b, h, i, seen] + np.log(times)
        top = scores.max()
        weights = np.exp(scores - top)
        out[b, h, i] = weights @ v[b, h // group, seen] / weights.sum()
        lse[b, h, i] = top + math.log(weights.sum())
    return out, lse
