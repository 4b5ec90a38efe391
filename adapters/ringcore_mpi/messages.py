"""Blocks as messages: typed, raw, in pieces, and never copied unless they have gaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpi4py import MPI

from ringcore import Blocks, Move, Spec
from ringcore_mpi.buffers import Bytes, bytes_of, contiguous
from ringcore_mpi.line import FIRST_BLOCK_TAG, Line, give_up
from ringcore_mpi.progress import Progress

PIECE = 2**30
"""The most bytes of one message: MPI libraries count in signed 32-bit numbers."""

KINDS = ("visiting", "carried")


class Exchange:
    """Blocks under way, some of them leaving and some arriving; all were started when this was made."""

    def __init__(
        self,
        line: Line,
        progress: Progress | None,
        kind: str,
        sends: Sequence[tuple[Move, Blocks]],
        receives: Sequence[tuple[Move, Sequence[Spec]]],
    ) -> None:
        self._line, self._kind = line, kind
        self._peers = sorted({move.peer for move, _ in receives}), sorted({move.peer for move, _ in sends})
        self._arrived = {move: tuple(spec.empty() for spec in specs) for move, specs in receives}
        leaving = [(move, tuple(contiguous(x) for x in blocks)) for move, blocks in sends]
        self._buffers: Any = (leaving, self._arrived)
        self._receives: list[Any] = []
        self._sends: list[Any] = []
        self.messages = self.bytes = 0
        comm = line.comm
        for move, piece in _pieces(self._arrived.items()):
            self._receives.append(comm.Irecv([piece, MPI.BYTE], move.peer, self._tag(move)))
        for move, piece in _pieces(leaving):
            self._sends.append(comm.Isend([piece, MPI.BYTE], move.peer, self._tag(move)))
            self.messages += 1
            self.bytes += piece.size
        self._requests = self._receives + self._sends
        self._progress = progress if self._requests else None
        if self._requests:
            line.open.append(self)
        if self._progress is not None:
            self._progress.add(self)

    def wait(self) -> Mapping[Move, Blocks]:
        """The blocks that arrived, once those that leave have left too."""
        if self._requests:
            with self._line.operation(f"the wait for {self._kind} blocks"):
                if self._progress is not None:
                    self._progress.remove(self)
                self._line.poll(self.test, self._waiting_for)
                self._line.open.remove(self)
                self._requests, self._buffers = [], None
        return self._arrived

    def test(self) -> bool:
        """Whether everything has left and arrived; moves it on."""
        return bool(MPI.Request.Testall(self._requests))

    def cancel(self) -> None:
        """Give up what is under way."""
        if self._progress is not None:
            self._progress.remove(self)
        # Testall leaves single requests of an unfinished list as they are, so the two lists are still good.
        give_up(self._sends, self._receives, self._buffers)

    def _tag(self, move: Move) -> int:
        return FIRST_BLOCK_TAG + KINDS.index(self._kind) * self._line.size + move.block

    def _waiting_for(self) -> str:
        sources, targets = (" and ".join(f"rank {peer}" for peer in peers) for peers in self._peers)
        waits = [f"{self._kind} blocks from {sources}"] if sources else []
        waits += [f"{self._kind} blocks to leave for {targets}"] if targets else []
        return ", or ".join(waits)


def _pieces(moves: Any) -> Iterator[tuple[Move, Bytes]]:
    """The memory of all blocks in pieces, in an order that does not depend on how the moves were listed.

    Sender and receiver must agree on the order of messages that share a peer and a tag.
    """
    for move, blocks in sorted(moves, key=lambda item: _order(item[0])):
        for x in blocks:
            memory = bytes_of(x)
            for start in range(0, memory.size, PIECE):
                yield move, memory[start : start + PIECE]


def _order(move: Move) -> tuple[int, int, int]:
    start = 0 if move.rows is None or move.rows.start is None else move.rows.start
    return move.peer, move.block, start
