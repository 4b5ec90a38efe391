"""Channels of the strictest kind, and real loops over them: what is posted waits for its match and holds up the rest.

No GPU is in it. A rank's thread of control stands for its stream: where that would wait for a mark, the rank is not
resumed until the mark is passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from ringcore.arrays import slice_of
from ringcore.ring import Loop, ring
from ringcore.values import Begin, Blocks, Move, Plan, Spec, Tile
from ringcore_torch.stream_messages import StreamMessages


@dataclass(eq=False)
class Mark:
    """A place in a stream; what lies before it is over once it is passed."""

    passed: bool


@dataclass(eq=False)
class Posted:
    """One group on one rank's end of a channel: (peer, tensor) that are still to go and to come."""

    sends: list[tuple[int, torch.Tensor]]
    receives: list[tuple[int, torch.Tensor]]
    marks: Sequence[Mark]
    done: Mark = field(default_factory=lambda: Mark(False))

    @property
    def begun(self) -> bool:
        return all(mark.passed for mark in self.marks)


class Wires:
    """A channel between all ranks: of each rank only the oldest group is under way."""

    def __init__(self, size: int) -> None:
        self.queues: list[deque[Posted]] = [deque() for _ in range(size)]

    def run(self) -> bool:
        """Move what can be moved; whether anything was."""
        moved = False
        for rank, queue in enumerate(self.queues):
            if not queue or not queue[0].begun:
                continue
            for peer in {peer for peer, _ in queue[0].sends}:
                theirs = self.queues[peer]
                while theirs and theirs[0].begun:
                    sent = next((i for i, (to, _) in enumerate(queue[0].sends) if to == peer), None)
                    came = next((i for i, (of, _) in enumerate(theirs[0].receives) if of == rank), None)
                    if sent is None or came is None:
                        break
                    (_, x), (_, y) = queue[0].sends.pop(sent), theirs[0].receives.pop(came)
                    assert x.shape == y.shape, "a message that is not the one that its receiver waits for"
                    y.copy_(x)
                    moved = True
        for queue in self.queues:
            if queue and queue[0].begun and not queue[0].sends and not queue[0].receives:
                queue.popleft().done.passed = moved = True
        return moved


class End:
    """One rank's end of a channel; ``awaited`` holds what the rank may not go on before."""

    def __init__(self, wires: Wires, rank: int, awaited: list[Mark]) -> None:
        self.wires, self.rank, self.awaited = wires, rank, awaited

    def ready(self) -> Mark:
        return Mark(True)

    def post(self, sends: Any, receives: Any, marks: Sequence[Mark]) -> Mark:
        # What is sent is not copied: whoever overwrites it too early is found out.
        self.wires.queues[self.rank].append(Posted(list(sends), list(receives), list(marks)))
        return self.wires.queues[self.rank][-1].done

    def order(self, mark: Mark) -> None:
        self.awaited.append(mark)


class VisitCount:
    """A `ringcore.ring.Work` on tensors: who visited which row of a block, told by the rows that came."""

    def __init__(self, plan: Plan, lengths: Sequence[int], carries: bool) -> None:
        self.plan, self.lengths, self.carries = plan, lengths, carries
        self.seen: list[torch.Tensor] = []

    def rows_of(self, owner: int) -> torch.Tensor:
        """[1, 1, rows, 1], numbers that no other rank's rows have, none of them 0."""
        return 1.0 + 1000 * owner + torch.arange(self.lengths[owner], dtype=torch.float64).reshape(1, 1, -1, 1)

    def visiting(self) -> Blocks:
        return (self.rows_of(self.plan.rank),)

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        like = self.rows_of(move.block)
        height = like.shape[2] if move.rows is None else len(move.rows)
        return (Spec((1, 1, height, 1), like, like.dtype),)

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        (spec,) = self.visiting_specs(move)
        return (Spec((1, 1, spec.shape[2], self.plan.size), spec.like, spec.dtype),) if self.carries else ()

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        share = torch.zeros(1, 1, block[0].shape[2], self.plan.size, dtype=torch.float64)
        share[..., self.plan.rank] = block[0][..., 0]
        if block[0].shape[2]:
            self.seen.append(block[0].clone())
        return (share,) if self.carries else ()

    def complete(self) -> None:
        """Nothing: counts are whole at any time."""

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        if rows is not None:
            share[0][:, :, rows.start : rows.stop : rows.step] += arrived[0]
            return share
        share[0].add_(arrived[0])
        arrived[0].fill_(torch.nan)  # which the protocol allows
        return share


Due: TypeAlias = Callable[[Sequence[Plan], Sequence[VisitCount], int], torch.Tensor]


def run_strictly(loops: Sequence[Loop], messages: Sequence[StreamMessages], wires: Any, awaited: Any) -> list[Any]:
    """Every rank's loop over its messages to the end, then `retire`; the results in the order of ranks.

    What is sent may be posted late, but whatever a rank waits for must come while all others only wait as well.
    """
    results: list[Any] = [None] * len(loops)
    replies: dict[int, Any] = dict.fromkeys(range(len(loops)))
    retired: set[int] = set()
    while replies:
        while wires[0].run() or wires[1].run():
            pass
        free = [rank for rank in replies if all(mark.passed for mark in awaited[rank])]
        assert free, f"ranks {sorted(replies)} wait for each other"
        for rank in free:
            awaited[rank].clear()
            if rank in retired:
                del replies[rank]
                continue
            try:
                while not awaited[rank]:
                    request = loops[rank].send(replies[rank])
                    if isinstance(request, Begin):
                        replies[rank] = messages[rank].exchange(request.kind, request.sends, request.receives)
                    else:
                        replies[rank] = request.token.wait()
            except StopIteration as stop:
                results[rank] = stop.value
                messages[rank].retire()
                retired.add(rank)
    assert not any(queue for channel in wires for queue in channel.queues), "posted, and never met"
    return results


def check_strictly(plans: Sequence[Plan], lengths: Sequence[int], carries: bool, due: Due | None = None) -> int:
    """Run plans over strict channels, two calls in a row; how many tensors were sent.

    Every block reaches its readers, and every share its owner, once. due: what the owner has then, if not that.
    """
    size = len(plans)
    wires = [Wires(size), Wires(size)]
    awaited: list[list[Mark]] = [[] for _ in plans]
    messages = [
        StreamMessages(rank, *(End(channel, rank, awaited[rank]) for channel in wires), check=lambda: None)
        for rank in range(size)
    ]
    for _ in range(2):
        works = [VisitCount(plan, lengths, carries) for plan in plans]
        loops = [ring(plan, work) for plan, work in zip(plans, works, strict=True)]
        results = run_strictly(loops, messages, wires, awaited)
        for plan, work in zip(plans, works, strict=True):
            due_here = [work.rows_of(owner)[:, :, part] for owner, part in _visits(plan, carries)]
            for came, sent in zip(work.seen, (x for x in due_here if x.shape[2]), strict=True):
                assert torch.equal(came, sent)
        if carries:
            for owner, came in enumerate(results):
                assert torch.equal(came[0], (due or _shares)(plans, works, owner))
    return sum(one.messages_sent for one in messages)


def _shares(plans: Sequence[Plan], works: Sequence[VisitCount], owner: int) -> torch.Tensor:
    """What every guest of a block adds to its accumulators."""
    rows = works[owner].rows_of(owner)
    due = torch.zeros(1, 1, rows.shape[2], len(plans), dtype=torch.float64)
    for guest in plans:
        for block, part in _visits(guest, carries=True):
            if block == owner:
                due[:, :, part, guest.rank] = rows[:, :, part, 0]
    return due


def _visits(plan: Plan, carries: bool) -> Iterator[tuple[int, slice]]:
    """Each visited block, and those of its rows that reach this rank, or that accumulators are carried for."""
    for step in plan.steps:
        if step.block is not None:
            rows = step.carry_out[0].rows if carries and step.carry_out else step.rows
            yield step.block, slice(None) if rows is None else slice_of(rows)
