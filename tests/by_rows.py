"""Attention row by row, in the widest float: each query meets just the keys that it sees, and nothing else is touched."""

from dataclasses import dataclass

import numpy as np

WIDE = np.longdouble  # float64 where there is nothing wider: logits of 1e4 cost the oracle 4 digits, too


@dataclass(frozen=True)
class Rows:
    """Results in float64; largest: the largest |v| of each row [B, H, S]; logit: the largest |q.k| scaled."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    largest: np.ndarray
    logit: float


def keys_of(row, batch, head, keys, *, causal=False, window=(None, None), offset=0, key_lengths=None, mask=None):
    """The keys that a query sees, one by one."""
    position = row + offset
    left, right = window
    seen = []
    for key in range(keys if key_lengths is None else key_lengths[batch]):
        late = causal and key > position
        far = (left is not None and key < position - left) or (right is not None and key > position + right)
        if not late and not far and (mask is None or mask[batch, head, row, key]):
            seen.append(key)
    return seen


def attend(q, k, v, dout, dlse, *, scale, bias=None, **visible):
    """What a call must give. bias and mask have four full axes; a key under a bias of -inf is not seen."""
    batch, heads, queries, _ = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    q, k, v, dout = (np.asarray(x).astype(WIDE) for x in (q, k, v, dout))
    out, dq, dk, dv = np.zeros_like(dout), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    lse, largest, logit = np.full(q.shape[:3], -np.inf, WIDE), np.zeros(q.shape[:3]), 0.0
    for b, h, i in np.ndindex(batch, heads, queries):
        at = b, h // group
        seen = keys_of(i, b, h, keys, **visible)
        if bias is not None:
            seen = [j for j in seen if bias[b, h, i, j] != -np.inf]
        if not seen:
            continue
        logits = k[at][seen] @ q[b, h, i] * WIDE(scale)
        scores = logits if bias is None else logits + np.asarray(bias[b, h, i, seen]).astype(WIDE)
        weights = np.exp(scores - scores.max())
        lse[b, h, i] = scores.max() + np.log(weights.sum())
        weights /= weights.sum()
        out[b, h, i] = weights @ v[at][seen]
        slopes = weights * ((v[at][seen] - out[b, h, i]) @ dout[b, h, i] + dlse[b, h, i]) * WIDE(scale)
        dq[b, h, i] = slopes @ k[at][seen]
        dk[at][seen] += np.outer(slopes, q[b, h, i])
        dv[at][seen] += np.outer(weights, dout[b, h, i])
        largest[b, h, i] = np.abs(v[at][seen]).max()
        logit = max(logit, float(np.abs(logits).max()))
    return Rows(*(x.astype(np.float64) for x in (out, lse, dq, dk, dv)), largest, logit)
