"""Shards larger than a GPU's memory: q in pieces, and for each of them the keys, piece by piece, from the files.

It is the ring's own loop. What visits comes from the files, the next piece while the last one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np

from ringcore.cli.backends import DeviceBackend
from ringcore.cli.request import Request
from ringcore.cli.tensors import Stored, read_rows
from ringcore.discovery import find_arithmetic
from ringcore.errors import KeywordError
from ringcore.exchange import run_rank
from ringcore.forward_work import ForwardWork
from ringcore.inputs import Inputs, within_range
from ringcore.protocols import Transport
from ringcore.ring import ring
from ringcore.session import visibility_of
from ringcore.tiling import tiles_between
from ringcore.values import Array, Blocks, Move, Plan, Spec, Step, Tile

_FOR_ARRAYS = 0.75  # of the room; the rest is for what kernels need beside
_LARGEST_BLOCK = 1 << 30  # bytes of k and v at a time, which the host holds in pinned memory
_BLOCKS = 4  # of k and v at a time: on a ring its own, the one that is read, the one that comes, a published one
_MULTIPLE = 128  # rows, by which kernels cut

Runs = tuple[range, ...]


def rows_that_fit(request: Request, room: int) -> tuple[int, int] | None:
    """How many rows of q and of k at a time leave enough of ``room`` bytes; None if this rank's shard fits whole.

    Raises KeywordError if not a single row fits.
    """
    q, k, v = request.arguments.q, request.arguments.k, request.arguments.v
    size, wide = request.dtype.itemsize, request.wide.itemsize
    # The query; its sums in the accumulation dtype, and twice in the inputs'; two rows' statistics.
    per_query = q.shape[1] * (q.shape[3] * size + v.shape[3] * (2 * size + wide) + 4 * wide)
    per_query = q.shape[0] * per_query + sum(map(_row_of, (request.question.bias, request.question.mask)))
    per_key = _BLOCKS * k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * size
    queries, keys = sum(map(len, request.q_runs)), max(request.k_layout.lengths, default=0)
    usable = int(room * _FOR_ARRAYS)
    if queries * per_query + keys * per_key <= usable:
        return None
    if usable < per_query + per_key:
        raise KeywordError(
            f"one query and one key take {per_query + per_key} bytes of the GPU's memory, but {usable} of {room} can "
            "be used. Give more (--device-memory), or fewer columns of bias and mask."
        )
    some = min(usable // 2, _BLOCKS * _LARGEST_BLOCK) // max(1, per_key)
    some = max(1, min(some, request.arguments.k.shape[2], (usable - per_query) // max(1, per_key)))
    return _even((usable - some * per_key) // max(1, per_query)), _even(some)


@dataclass(frozen=True)
class Streaming:
    """Attention of this rank's rows, at most ``rows`` of q and ``keys`` of k at a time.

    terms: bias and mask, which it reads for some rows. report: hears how many pairs were computed.
    """

    request: Request
    rows: int
    keys: int
    terms: Callable[[Runs], dict[str, Array]]
    report: Callable[[int], object] | None

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return sum(1 for _ in cut(self.request.q_runs, self.rows))

    def results(self) -> tuple[Array, Array]:
        """Memory for out [B, H, S, E] and lse [B, H, S] as NumPy arrays."""
        request = self.request
        shape = *request.arguments.q.shape[:2], sum(map(len, request.q_runs))
        out = np.empty((*shape, request.arguments.v.shape[3]), dtype=request.dtype)
        return out, np.empty(shape, dtype=request.wide)

    def pieces(self, out: Array, lse: Array) -> Iterator[None]:
        """Put the results there, a piece of q at a time."""
        done = 0
        for runs in cut(self.request.q_runs, self.rows):
            some = slice(done, done := done + sum(map(len, runs)))
            out[:, :, some], lse[:, :, some] = self._piece(runs)
            if self.report is not None:
                self.report(self.request.pairs(runs))
            yield

    def _piece(self, runs: Runs) -> tuple[Array, Array]:
        """out and lse of the queries at these positions."""
        request, backend = self.request, cast(DeviceBackend, self.request.backend)
        files = _Files(request, self.keys)
        q = np.empty((*request.arguments.q.shape[:2], sum(map(len, runs)), request.arguments.q.shape[3]), request.dtype)
        read_rows(request.question.q, request.question.axis, runs, request.in_file_order(q))
        terms = {name: backend.enter(term) for name, term in self.terms(runs).items()}
        k, v = (
            backend.enter(np.empty((*x.shape[:2], 0, x.shape[3]), request.dtype))
            for x in (request.arguments.k, request.arguments.v)
        )
        # Arrays here are [B, H, S, D], whatever order the files have.
        arguments = replace(request.arguments, axes="bhsd").about(
            Inputs(backend.enter(q), k, v, terms.get("bias"), terms.get("mask"))
        )
        bias = within_range(arguments.bias, arguments.q)
        work = ForwardWork(
            arguments.q, k, v, bias, arguments.mask, score=arguments.score, kernels=request.kernels,
            lengths=files.lengths, arithmetic=find_arithmetic(arguments.q),
        )  # fmt: skip
        visibility = visibility_of(arguments, request.arguments.q.shape[2], request.arguments.k.shape[2])
        tiles = [tiles_between(runs, block, visibility) for block in files.blocks]
        run_rank(ring(_plan(tiles, files), work), cast(Transport, files))
        out, maximum, total = work.finish(arguments.q.dtype)
        lse = find_arithmetic(arguments.q).finished_lse(maximum, total, -math.inf)
        return backend.leave(out), backend.leave(lse)


def cut(runs: Sequence[range], rows: int) -> Iterator[Runs]:
    """The positions in order, at most ``rows`` at a time."""
    piece: list[range] = []
    left = rows
    for run in runs:
        while run:
            piece.append(run[:left])
            run, left = run[left:], left - len(piece[-1])
            if left == 0:
                yield tuple(piece)
                piece, left = [], rows
    if piece:
        yield tuple(piece)


class _Files:
    """The keys and values in the files, as blocks that arrive in the loop: what a transport is to a ring."""

    def __init__(self, request: Request, rows: int) -> None:
        self._request = request
        self.blocks = tuple(cut((range(request.arguments.k.shape[2]),), rows))
        self.lengths = [sum(map(len, block)) for block in self.blocks]

    def exchange(self, kind: str, sends: Sequence[Any], receives: Sequence[tuple[Move, Sequence[Spec]]]) -> _Arriving:
        """Begin to read the one block that is to arrive."""
        ((move, specs),) = receives
        backend = cast(DeviceBackend, self._request.backend)
        arrays = tuple(spec.empty() for spec in specs)
        return _Arriving(move, arrays, backend.fill(arrays, partial(self._read, self.blocks[move.block])))

    def _read(self, runs: Runs, k: Array, v: Array) -> None:
        question = self._request.question
        for stored, x in ((question.k, k), (question.v, v)):
            read_rows(stored, question.axis, runs, self._request.in_file_order(x))


class _Arriving:
    """A block on its way; implements `ringcore.Pending`."""

    def __init__(self, move: Move, arrays: Blocks, finish: Callable[[], None]) -> None:
        self._move, self._arrays, self._finish = move, arrays, finish

    def wait(self) -> Mapping[Move, Blocks]:
        """The block, once it is there."""
        self._finish()
        return {self._move: self._arrays}


def _plan(tiles: Sequence[tuple[Tile, ...]], files: _Files) -> Plan:
    """Every block that some tile reads, one after the other; it starts with none, as rank -1 would."""
    wanted = [block for block, found in enumerate(tiles) if found]
    steps = [
        Step(
            block=block,
            tiles=tiles[block] if block is not None else (),
            receives=() if following is None else (Move(following, following),),
            drops=() if block is None else ((block, None),),
        )
        for block, following in zip([None, *wanted], [*wanted, None], strict=True)
    ]
    return Plan(-1, len(files.blocks), tuple(steps))


def _even(rows: int) -> int:
    return rows - rows % _MULTIPLE if rows > _MULTIPLE else rows


def _row_of(term: Stored | None) -> int:
    """The bytes of a term for one more query; one that all queries share takes none."""
    if term is None or term.shape[-2] == 1:
        return 0
    return math.prod(term.shape) // term.shape[-2] * term.dtype.itemsize
