"""What forward and backward share: the edges of a band, and tiles computed with every precaution."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ringcore import Array, Band, Score
from ringcore_numpy.threads import Scratch

Span = tuple[int, int]
"""A half-open range of rows or columns."""


def overlap(a: Span, b: Span) -> Span:
    """The part that two spans share; its end is not above its start where they share nothing."""
    return max(a[0], b[0]), min(a[1], b[1])


def blocks(span: Span, length: int) -> list[Span]:
    """The span cut into pieces of ``length``, the last one shorter."""
    return [(start, min(start + length, span[1])) for start in range(span[0], span[1], length)]


def accumulation(x: Array) -> Any:
    """float64 for float64 arrays, float32 for all others."""
    return np.float64 if x.dtype == np.float64 else np.float32


@lru_cache(maxsize=8)
def _staircases(size: int) -> tuple[Array, Array]:
    """Where a band hides pairs beyond its upper and its lower bound [size, size], bool."""
    upper = np.arange(size)[None, :] >= np.arange(size)[:, None]
    upper.flags.writeable = False
    lower = ~upper
    lower.flags.writeable = False
    return upper, lower


@lru_cache(maxsize=16)
def _additive_staircases(size: int, dtype: Any) -> tuple[Array, Array]:
    """The same as numbers to add: -inf where hidden, 0 elsewhere."""
    upper, lower = (np.where(hidden, -np.inf, 0.0).astype(dtype) for hidden in _staircases(size))
    return upper, lower


def _edges(band: Band, rows: Span, columns: Span, staircases: tuple[Array, Array]) -> Iterator[tuple[slice, Array]]:
    """The columns of a tile that the band hides from some of its rows, each with the part of a staircase.

    The columns lie in ``band.columns(*rows)``. Both staircases are cut where they meet the tile, so that
    most of a tile on the diagonal is not touched.
    """
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    upper, lower = staircases
    if band.hi is not None:
        step = band.hi + 1 + rows[0] - columns[0]  # the first column that row 0 does not see
        first = max(step, 0)
        if first < width:
            yield slice(first, width), upper[:height, first - step : width - step]
    if band.lo is not None:
        step = band.lo + rows[0] - columns[0]  # the first column that row 0 sees: not above 0
        last = min(height - 1 + step, width)
        if last > 0:
            yield slice(0, last), lower[:height, -step : last - step]


def add_edges(scores: Array, band: Band, rows: Span, columns: Span, size: int) -> None:
    """Set hidden pairs of finite scores to -inf; staircases of ``size`` rows are kept."""
    for part, step in _edges(band, rows, columns, _additive_staircases(size, scores.dtype.type)):
        scores[:, part] += step


def cut(x: Array, at: tuple[int, int], rows: Span, columns: Span) -> Array:
    """A tile of an array with four axes, each of full length or 1, at (batch, head)."""
    batch, head, height, width = (length > 1 for length in x.shape)
    return x[
        at[0] if batch else 0,
        at[1] if head else 0,
        slice(*rows) if height else slice(None),
        slice(*columns) if width else slice(None),
    ]


class Careful:
    """Scores with bias, mask and softcap, in which nothing hidden, not even a NaN, reaches a row.

    All tiles stay in scratch memory: the caller gives the tile of q.k and gets it back finished.
    """

    def __init__(self, score: Score, band: Band, bias: Array | None, mask: Array | None, size: int) -> None:
        self.score, self.band, self.bias, self.mask = score, band, bias, mask
        self._size = size

    def finish(
        self,
        scores: Array,
        at: tuple[int, int],
        rows: Span,
        columns: Span,
        scratch: Scratch,
        *,
        slope: bool = False,
    ) -> Array | None:
        """Turn scaled products [n, m] into scores in place, -inf where hidden.

        ``slope`` asks for the softcap's derivative [n, m]; None where there is no softcap.
        """
        factor = None
        cap = self.score.softcap
        if cap is not None:
            scores /= cap
            np.tanh(scores, out=scores)
            if slope:
                factor = scratch.take("slope", scores.shape, scores.dtype)
                np.multiply(scores, scores, out=factor)
                np.subtract(1.0, factor, out=factor)
            scores *= cap
        if self.bias is not None:
            bias = cut(self.bias, at, rows, columns).astype(scores.dtype, copy=False)
            scores += bias
            if np.isnan(np.max(scores)):  # a NaN under a bias of -inf is as hidden as under a mask
                np.copyto(scores, -np.inf, where=bias == -np.inf)
        for part, hidden in _edges(self.band, rows, columns, _staircases(self._size)):
            np.copyto(scores[:, part], -np.inf, where=hidden)
        if self.mask is not None:
            np.copyto(scores, -np.inf, where=~cut(self.mask, at, rows, columns))
        return factor

    def visible(self, shape: tuple[int, int], at: tuple[int, int], rows: Span, columns: Span) -> Array:
        """Which pairs of a tile may meet [n, m], bool: not read off the scores, which can be -inf by themselves."""
        seen = np.ones(shape, dtype=np.bool_)
        for part, hidden in _edges(self.band, rows, columns, _staircases(self._size)):
            seen[:, part] &= ~hidden
        if self.mask is not None:
            seen &= cut(self.mask, at, rows, columns)
        if self.bias is not None:
            seen &= cut(self.bias, at, rows, columns) != -np.inf
        return seen


def guarded_product(weights: Array, values: Array, visible: Array | None, out: Array) -> None:
    """weights [n, m] @ values [m, e], where a row of values reaches only the rows that see it.

    visible [n, m] bool; None if every value is finite. Weights are 0 where not visible, but 0 * NaN is NaN.
    """
    if visible is None or np.isfinite(np.sum(values)):
        np.matmul(weights, values, out=out)
        return
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    clean = values.copy()
    clean[bad] = 0
    np.matmul(weights, clean, out=out)
    for row in bad:
        seen = visible[:, row]
        out[seen] += weights[seen, row, None] * values[row]
