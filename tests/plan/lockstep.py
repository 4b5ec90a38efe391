"""A simulation of what plans exchange: all ranks in lockstep, with no arrays and no loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeAlias

from ringcore.values import Held, Move, Plan, Step

Shares: TypeAlias = Counter[tuple[int, int]]
"""Accumulators, as the (rank, block) whose tiles were added to them, each as often as it was."""


Letter: TypeAlias = tuple[int, int, int, range | None]
"""Accumulators on their way, by sender, receiver, block and rows."""


@dataclass(frozen=True)
class Trace:
    """What a simulation saw.

    owned: for each rank its final accumulators, if accumulators are carried.
    sent: how often each block was sent. most_held: the most blocks that a rank held at once.
    """

    owned: tuple[Shares, ...]
    sent: Counter[int]
    most_held: int


def walk(plans: Sequence[Plan]) -> Trace:
    """Every rank's steps side by side, failing at whatever no transport could do or nobody needs."""
    ranks = range(len(plans))
    assert [(plan.rank, plan.size) for plan in plans] == [(rank, len(plans)) for rank in ranks]
    held: list[set[Held]] = [{(rank, None)} for rank in ranks]
    ready: dict[Letter, tuple[int, Move, Shares]] = {}
    moving: set[tuple[int, Held]] = set()
    # Of two steps that share what moves, each is one behind that of the same half.
    behind = 2 if any(step.holds for plan in plans for step in plan.steps) else 1
    owned: list[Shares | None] = [None] * len(plans)
    sent: Counter[int] = Counter()
    most_held = 1
    for time, steps in enumerate(zip_longest(*(plan.steps for plan in plans), fillvalue=Step())):
        came = meet(steps)
        sent.update(block for _, (block, _) in came)
        moving |= came
        for rank, step in enumerate(steps):
            check_sends(rank, step, held[rank])
            if step.block is None:
                assert step.tiles == step.carry_out == ()
                assert step.carry_in is None
                continue
            read = step.block, step.rows
            assert read in held[rank], f"rank {rank} reads block {read}, which it does not hold"
            share: Shares = Counter({(rank, step.block): 1})
            if step.carry_in:
                assert step.carry_in.block == step.block
                sent_at, _, arrived = ready.pop((step.carry_in.peer, rank, step.block, step.carry_in.rows))
                # A message that nobody takes up at once would hold its sender back.
                assert sent_at == time - behind, "accumulators follow one step behind"
                share += arrived
            keep(rank, step, share, owned)
            for move in step.carry_out:
                letter = (rank, move.peer, move.block, move.rows)
                assert move.peer != rank
                assert letter not in ready, "two messages that look alike"
                ready[letter] = time, move, share
        (holds,) = {step.holds for step in steps}
        if not holds:
            for rank, block in moving:
                assert block not in held[rank], f"block {block} comes to rank {rank}, which holds it"
                held[rank].add(block)
            moving = set()
        most_held = max(most_held, *map(len, held))
        for rank, step in enumerate(steps):
            held[rank] -= set(step.drops)
            still = {held for later in plans[rank].steps[time + 1 :] for held in used(rank, later)}
            assert held[rank] <= still, f"rank {rank} keeps blocks that it never needs again"
    return Trace(tuple(bring_home(plans, ready, owned)), sent, most_held)


def used(rank: int, step: Step) -> Iterator[Held]:
    """What a step reads and sends, of what its rank holds."""
    yield step.block, step.rows
    yield from ((move.block, None if move.block == rank else move.rows) for move in step.sends)


def meet(steps: Sequence[Step]) -> set[tuple[int, Held]]:
    """What arrives, and where, where every receive of a step has its send in the same step."""
    sends = Counter((rank, m.peer, m.block, m.rows) for rank, step in enumerate(steps) for m in step.sends)
    receives = Counter((m.peer, rank, m.block, m.rows) for rank, step in enumerate(steps) for m in step.receives)
    assert sends == receives
    assert all(count == 1 and sender != receiver for (sender, receiver, *_), count in sends.items())
    return {(rank, (move.block, move.rows)) for rank, step in enumerate(steps) for move in step.receives}


def check_sends(rank: int, step: Step, held: set[Held]) -> None:
    """A rank sends on what came as it came, and of its own block any part: rows count those of the owner."""
    for move, wanted in zip(step.sends, list(used(rank, step))[1:], strict=True):
        assert wanted in held, f"rank {rank} sends {move}, which it does not hold"


def keep(rank: int, step: Step, share: Shares, owned: list[Shares | None]) -> None:
    """Accumulators of a rank's own block stay, and there is one step that makes them."""
    if step.block == rank:
        assert owned[rank] is None, f"rank {rank} reads its own block in two steps"
        owned[rank] = share
    else:
        assert step.carry_out, f"rank {rank} has a share of block {step.block} and nobody to give it to"


def bring_home(
    plans: Sequence[Plan], ready: dict[Letter, tuple[int, Move, Shares]], owned: Sequence[Shares | None]
) -> list[Shares]:
    """Every rank's own accumulators with those that come home, and no letter is left over."""
    found = []
    for plan, own in zip(plans, owned, strict=True):
        assert own is not None, f"rank {plan.rank} has no step of its own"
        total = own.copy()
        last: dict[int, int] = {}
        for move in plan.home:
            assert move.block == plan.rank
            sent_at, _, shares = ready.pop((move.peer, plan.rank, plan.rank, move.rows))
            assert sent_at > last.get(move.peer, -1), "what one rank sends home is taken in another order"
            last[move.peer] = sent_at
            total += shares
        found.append(total)
    assert not ready, f"accumulators that nobody takes: {sorted(ready)}"
    return found


def check_exchanges(plans: Sequence[Plan]) -> Trace:
    """Walk the plans; every reader's share of a block must reach its owner once, and nothing go further than needed."""
    trace = walk(plans)
    for rank, shares in enumerate(trace.owned):
        assert shares == Counter((p.rank, rank) for p in plans for step in p.steps if step.block == rank)
    for plan in plans:
        for time, step in enumerate(plan.steps):
            for move in step.receives:
                later = plan.steps[time + 1 :]
                read = any(s.block == move.block and s.tiles for s in later)
                assert read or any(m.block == move.block for s in later for m in s.sends)
    return trace
