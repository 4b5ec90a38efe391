"""The driver of rings in one process: every rank's loop in turn, blocks handed over as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ringcore.errors import TransportError
from ringcore.ring import Loop
from ringcore.values import Blocks, Finish, Move


def run_local(loops: Sequence[Loop]) -> list[Blocks | None]:
    """Run all ranks' loops to their end, round robin; their results in the order of ranks.

    Raises TransportError if the plans wait for each other for ever.
    """
    mail: dict[tuple[str, int, int, int, range | None], deque[Blocks]] = {}
    results: list[Blocks | None] = [None] * len(loops)
    # What each rank waits for: the receives of the Begin that its Finish named, or None to just go on.
    waiting: dict[int, tuple[str, tuple[Move, ...]] | None] = dict.fromkeys(range(len(loops)))
    while waiting:
        progress = False
        for rank in list(waiting):
            wanted = waiting[rank]
            reply: Any = None
            if wanted is not None:
                kind, moves = wanted
                boxes = [mail.get((kind, move.peer, rank, move.block, move.rows)) for move in moves]
                if not all(boxes):
                    continue
                reply = {move: box.popleft() for move, box in zip(moves, boxes, strict=True) if box}
            progress = True
            try:
                waiting[rank] = _advance(loops[rank], rank, reply, mail)
            except StopIteration as stop:
                results[rank] = stop.value
                del waiting[rank]
        if not progress:
            raise TransportError(f"ranks {sorted(waiting)} wait for blocks that no rank sends: the plan is not sound.")
    return results


def _advance(loop: Loop, rank: int, reply: Any, mail: dict[Any, deque[Blocks]]) -> tuple[str, tuple[Move, ...]]:
    """Run one loop up to its next Finish; what that waits for."""
    while True:
        request = loop.send(reply)
        if isinstance(request, Finish):
            kind, moves = request.token
            return kind, moves
        for move, blocks in request.sends:
            mail.setdefault((request.kind, rank, move.peer, move.block, move.rows), deque()).append(blocks)
        reply = request.kind, tuple(move for move, _ in request.receives)
