"""One tile of attention row by row in float64: each row meets just the keys that it sees, and nothing else is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ringcore import Band, Score, Tile

ALL = Band()


@dataclass(frozen=True)
class Case:
    """A tile's arrays as NumPy's [B, H, S, D], and what is done to its scores."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    score: Score
    band: Band = ALL
    bias: np.ndarray | None = None
    mask: np.ndarray | None = None

    @property
    def tile(self) -> Tile:
        every, (rows, keys) = slice(None), (range(x.shape[2]) for x in (self.q, self.k))
        return Tile(every, every, every, every, every, (rows,), (keys,), self.band)


@dataclass(frozen=True)
class Rows:
    """What a tile must give; delta is rowsum(dout * out), dscores [B, H, S, T] the gradients of the scores."""

    weighted: np.ndarray
    maximum: np.ndarray
    total: np.ndarray
    out: np.ndarray
    delta: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dscores: np.ndarray


def draw(
    seed=0, batch=2, heads=4, key_heads=2, rows=23, keys=31, width=6, values=5, dtype="float64", scale=0.4,
    softcap=None, band=ALL, bias=None, mask=None,
):  # fmt: skip
    """A seeded case; bias and mask: their shapes."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shapes = (heads, rows, width), (key_heads, keys, width), (key_heads, keys, values), (heads, rows, values)
    arrays = [rng.standard_normal((batch, *shape)).astype(kind) for shape in shapes]
    bias = None if bias is None else rng.standard_normal(bias).astype(kind)
    mask = None if mask is None else rng.random(mask) < 0.7
    return Case(*arrays, Score(scale, softcap), band, bias, mask)


def seen_by(case: Case, b: int, h: int, i: int) -> list[int]:
    """The keys that a row sees."""
    found = []
    for j in range(case.k.shape[2]):
        near = (case.band.lo is None or j - i >= case.band.lo) and (case.band.hi is None or j - i <= case.band.hi)
        shown = case.mask is None or _at(case.mask, b, h, i, j)
        if near and shown and (case.bias is None or _at(case.bias, b, h, i, j) != -np.inf):
            found.append(j)
    return found


def _at(term: np.ndarray, *place: int) -> Any:
    return term[tuple(0 if length == 1 else n for length, n in zip(term.shape, place, strict=True))]


def attend(case: Case) -> Rows:
    """What the tile must give."""
    q, k, v, dout = (np.asarray(x).astype(np.float64) for x in (case.q, case.k, case.v, case.dout))
    batch, heads, rows, _ = q.shape
    group = heads // max(1, k.shape[1])
    maximum, total = np.full(q.shape[:3], -np.inf), np.zeros(q.shape[:3])
    weighted, out, dq, dk, dv = (np.zeros_like(x) for x in (dout, dout, q, k, v))
    delta, dscores = np.zeros(q.shape[:3]), np.zeros((batch, heads, rows, k.shape[2]))
    for b, h, i in np.ndindex(batch, heads, rows):
        keys, g, at = seen_by(case, b, h, i), h // group, (b, h, i)
        if not keys:
            continue
        with np.errstate(all="ignore"):
            raw = k[b, g, keys] @ q[at] * case.score.scale
            cap = case.score.softcap
            scores = raw if cap is None else cap * np.tanh(raw / cap)
            slope = 1.0 if cap is None else 1 - np.tanh(raw / cap) ** 2
            if case.bias is not None:
                scores = scores + [float(_at(case.bias, *at, j)) for j in keys]
            maximum[at] = scores.max()
            powers = np.exp(scores - maximum[at])
            total[at] = powers.sum()
            weighted[at] = powers @ v[b, g, keys]
            weights = powers / total[at]
            out[at] = weighted[at] / total[at]
            delta[at] = dout[at] @ out[at]
            ds = weights * (v[b, g, keys] @ dout[at] - delta[at])
            dscores[at][keys] = ds
            slopes = ds * slope * case.score.scale
            dq[at] = slopes @ k[b, g, keys]
            dk[b, g, keys] += np.outer(slopes, q[at])
            dv[b, g, keys] += np.outer(weights, dout[at])
    return Rows(weighted, maximum, total, out, delta, dq, dk, dv, dscores)


def of_bias(case: Case, truth: Rows) -> np.ndarray:
    """The gradient of the bias, in its own shape."""
    axes = tuple(axis for axis in range(4) if case.bias.shape[axis] == 1)
    return truth.dscores.sum(axes, keepdims=True)
