"""The driver of rings of processes: one rank's loop over a transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ringcore.arrays import slice_of
from ringcore.protocols import OneSided, Pending, Transport
from ringcore.ring import Loop
from ringcore.values import Array, Begin, Blocks, Move, Plan, Spec


def run_rank(loop: Loop, transport: Transport) -> Blocks | None:
    """Run one rank's loop to its end, and return its result."""
    reply: Any = None
    try:
        while True:
            request = loop.send(reply)
            if isinstance(request, Begin):
                reply = transport.exchange(request.kind, request.sends, request.receives)
            else:
                reply = request.token.wait()
    except StopIteration as stop:
        result: Blocks | None = stop.value
        return result


class InPlace:
    """A transport that reads published visiting blocks where they lie, and sends the rest as messages.

    plan: says which rows of a block this rank reads.
    """

    def __init__(self, transport: OneSided, plan: Plan) -> None:
        self.transport, self.plan = transport, plan
        self.rank, self.size, self.node, self.sharers = (
            transport.rank,
            transport.size,
            transport.node,
            transport.sharers,
        )

    def check(self, *arrays: Array) -> None:
        """Raise UnsupportedError for arrays that cannot be carried."""
        self.transport.check(*arrays)

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note."""
        return self.transport.gather(note)

    def abort(self, error: BaseException) -> None:
        """Tell every peer."""
        self.transport.abort(error)

    def exchange(
        self,
        kind: str,
        sends: Sequence[tuple[Move, Blocks]],
        receives: Sequence[tuple[Move, Sequence[Spec]]],
    ) -> Pending:
        """Fetch what can be read in place; exchange the rest."""
        if kind != "visiting":
            return self.transport.exchange(kind, sends, receives)
        reaches = self.transport.reaches
        fetched = {
            move: self.transport.fetch(move.block, None if move.rows is None else slice_of(move.rows), self._seen(move))
            for move, _ in receives
            if reaches(self.rank, move.block)
        }
        messages = self.transport.exchange(
            kind,
            [(move, blocks) for move, blocks in sends if not reaches(move.peer, move.block)],
            [(move, specs) for move, specs in receives if move not in fetched],
        )
        return _Both(fetched, messages)

    def _seen(self, came: Move) -> slice | None:
        """The rows of what came that are ever read here: all of them where it goes on as a message."""
        sends = (move for step in self.plan.steps for move in step.sends if move.block == came.block)
        goes_on = any(not self.transport.reaches(move.peer, came.block) for move in sends)
        return None if goes_on else self.plan.seen(came.block, came.rows)


def places_at_home(
    carried: Mapping[int, Mapping[Move, Sequence[Spec]]], room: Callable[[Sequence[Spec]], int], start: int = 0
) -> tuple[dict[tuple[int, int], int], int, int]:
    """Where in an owner's memory, from ``start`` on, what each peer carries home lies, by (owner, peer).

    And where the last of them ends, and what the largest takes. Several peers may be on their way at once, so none gets
    another's place. carried: what `OneSided.publish` is told. room: the bytes that blocks take.
    """
    places, last, largest = {}, start, 0
    for owner, moves in carried.items():
        end = start
        for move, specs in moves.items():
            size = room(specs)
            places[owner, move.peer] = end
            end, largest = end + size, max(largest, size)
        last = max(last, end)
    return places, last, largest


class _Both:
    def __init__(self, fetched: Mapping[Move, Blocks], messages: Pending) -> None:
        self.fetched, self.messages = fetched, messages

    def wait(self) -> Mapping[Move, Blocks]:
        return {**self.fetched, **self.messages.wait()}
