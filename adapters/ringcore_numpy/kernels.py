"""The kernels object that ringcore's discovery finds under the name "numpy"."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from ringcore import Array, Capabilities, Gradients, Partial, Score, Tile, empty_partial
from ringcore_numpy.backward import Backward
from ringcore_numpy.forward import Forward
from ringcore_numpy.threads import Job, Scratch, Team

_CAPABILITIES = Capabilities(name="numpy", libraries=frozenset({"numpy"}), devices=frozenset({"cpu"}), parts=True)


class NumpyKernels:
    """Attention of NumPy arrays over one tile, on ``threads`` threads; see `ringcore.protocols.Kernels`.

    Results do not depend on the number of threads. Float16 and bfloat16 arrays are cast block by block;
    sums are kept in float32, or in float64 for float64 arrays. Beside its results a call needs a few
    MiB per thread, whatever the lengths.
    """

    def __init__(self, threads: int = 1) -> None:
        self._team = Team(threads)

    @property
    def threads(self) -> int:
        """How many threads compute, the caller's own among them."""
        return self._team.threads

    @property
    def capabilities(self) -> Capabilities:
        """Every dtype, bias, mask, softcap and gradients, for NumPy arrays alone."""
        return _CAPABILITIES

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
        """The tile's partial merged into ``state``, in the buffers of ``state`` or in new ones.

        Shapes: q [B, H, S, D], k [B, Hk, T, D], v [B, Hk, T, E]; bias and mask [B or 1, H or 1, S or 1, T or 1].
        Gives weighted [B, H, S, E], maximum and total [B, H, S] in float32, or float64 for float64.
        """
        if not tile.parts:
            call = Forward(q, k, v, score=score, band=tile.band, bias=bias, mask=mask, state=state)
            self._team.run(call.tasks, call.work)
            return call.result
        if state is None:
            state = empty_partial(q, v.shape[3])
        self._together(
            Forward(
                *_rows((q,), rows), *_rows((k, v), keys), score=score, band=part.band, bias=None, mask=None,
                state=Partial(*_rows((state.weighted, state.maximum, state.total), rows)), among=len(tile.parts),
            )
            for part, rows, keys in tile.places()
        )  # fmt: skip
        return state

    def backward(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        maximum: Array,
        total: Array,
        delta: Array,
        *,
        score: Score,
        tile: Tile,
        bias: Array | None = None,
        mask: Array | None = None,
        into: Gradients,
    ) -> Gradients:
        """``into``, with the tile's gradients added in place; what is None there is not computed.

        Shapes: dout [B, H, S, E]; maximum, total and delta [B, H, S]; the others as in `forward`. A row whose
        maximum is -inf or whose total is 0 contributes nothing.
        """
        if not tile.parts:
            call = Backward(
                dout, q, k, v, maximum, total, delta, score=score, band=tile.band, bias=bias, mask=mask, into=into
            )
            self._team.run(call.tasks, call.work)
            return into
        self._together(
            Backward(
                *_rows((dout, q), rows), *_rows((k, v), keys), *_rows((maximum, total, delta), rows),
                score=score, band=part.band, bias=None, mask=None, among=len(tile.parts),
                into=Gradients(*_rows((into.dq,), rows), *_rows((into.dk, into.dv), keys)),
            )
            for part, rows, keys in tile.places()
        )  # fmt: skip
        return into

    def _together(self, parts: Iterable[Forward | Backward]) -> None:
        """All tasks of calls that write to different rows and keys, each call's own in order."""
        tasks = [(part, task) for part in parts for task in range(part.tasks)]

        def work(number: int, scratch: Scratch, job: Job) -> None:
            part, task = tasks[number]
            part.work(task, scratch, job)

        self._team.run(len(tasks), work)


def _rows(arrays: Sequence[Any], places: slice) -> list[Any]:
    """Some rows of each array [B, H, S, ...]; None stays."""
    return [None if x is None else x[:, :, places] for x in arrays]


def load(sharers: int = 1) -> NumpyKernels:
    """Kernels for one of ``sharers`` ranks on this machine, which share its cores evenly.

    OMP_NUM_THREADS, if a positive integer, is taken as the thread count of each rank.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "").strip()
    if chosen.isdecimal() and int(chosen) > 0:
        return NumpyKernels(threads=int(chosen))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return NumpyKernels(threads=max(1, cores // max(1, sharers)))
