"""A progress bar with the time left: kernels that compute a tile slab by slab and report each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from ringcore.arrays import put
from ringcore.cli.visible import pairs_in_band
from ringcore.merge import empty_partial
from ringcore.partial import Partial
from ringcore.protocols import Kernels
from ringcore.values import Array, Capabilities, Gradients, Score, Tile

_SLABS = 32
_LEAST_ROWS = 512  # below it, kernels would read the keys too often for each row


class ReportingKernels:
    """The given kernels, a tile's rows cut into slabs of equal visible area; ``report`` hears of each one's pairs.

    Equal to the given kernels within rounding. Pairs are counted over batch and query heads.
    """

    def __init__(
        self, kernels: Kernels, report: Callable[[int], object], slabs: int = _SLABS, least_rows: int = _LEAST_ROWS
    ) -> None:
        self._kernels, self._report, self._slabs, self._least_rows = kernels, report, slabs, least_rows

    @property
    def capabilities(self) -> Capabilities:
        """Those of the given kernels, but a tile at a time."""
        return replace(self._kernels.capabilities, parts=False)

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        score: Score,
        tile: Tile,
        bias: Array | None = None,
        mask: Array | None = None,
        state: Partial | None = None,
    ) -> Partial:
        """The tile's partial merged into ``state``."""
        height, heads = q.shape[2], q.shape[0] * q.shape[1]
        areas = pairs_in_band(tile.band, height, k.shape[2])
        cuts = self._cuts(np.cumsum(areas), height)
        if len(cuts) == 2:
            result = self._kernels.forward(q, k, v, score=score, tile=tile, bias=bias, mask=mask, state=state)
            self._report(int(areas.sum()) * heads)
            return result
        result = (state or empty_partial(q, v.shape[3])).widened
        for start, stop in pairwise(cuts):
            rows = (slice(None), slice(None), slice(start, stop))
            piece = Partial(*(x[rows] for x in _fields(result)))
            part = self._kernels.forward(
                q[rows], k, v, score=score,
                tile=tile.part((start, stop), (0, tile.width), tile.band.shifted(start, 0)),
                bias=_term(bias, rows), mask=_term(mask, rows), state=piece,
            )  # fmt: skip
            if part is not piece:
                result = Partial(*(put(x, rows, new) for x, new in zip(_fields(result), _fields(part), strict=True)))
            self._report(int(areas[start:stop].sum()) * heads)
        return result

    def backward(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        maximum: Array,
        total: Array,
        delta: Array | None,
        *,
        score: Score,
        tile: Tile,
        bias: Array | None = None,
        mask: Array | None = None,
        into: Gradients,
        **rows: Array | None,
    ) -> Gradients:
        """The gradients, uncut and unreported."""
        return self._kernels.backward(
            dout, q, k, v, maximum, total, delta, score=score, tile=tile, bias=bias, mask=mask, into=into, **rows
        )

    def _cuts(self, summed: Any, height: int) -> list[int]:
        """Where the slabs begin and end."""
        slabs = min(self._slabs, height // self._least_rows)
        if slabs < 2:
            return [0, height]
        wanted = summed[-1] * np.arange(1, slabs) / slabs
        inner = {int(cut) for cut in np.searchsorted(summed, wanted, side="left") + 1}
        return [0, *sorted(cut for cut in inner if 0 < cut < height), height]


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], object] | None]:
    """What to report advances to, or None where no bar is shown; the bar goes to the error stream and is removed."""
    if not (shown and total and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("attention"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("elapsed"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("attention", total=total)
        yield lambda pairs: progress.advance(task, pairs)


def _term(term: Array | None, rows: tuple[slice, ...]) -> Array | None:
    return term if term is None or term.shape[2] == 1 else term[rows]


def _fields(partial: Partial) -> tuple[Array, Array, Array]:
    return partial.weighted, partial.maximum, partial.total
