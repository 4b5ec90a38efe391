"""A simulation of what plans exchange: all ranks in lockstep, with no arrays and no loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeAlias

from ringcore.values import Move, Plan, Step

Shares: TypeAlias = Counter[tuple[int, int]]
"""Accumulators, as the (rank, block) whose tiles were added to them, each as often as it was."""


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
    held: list[dict[int, range | None]] = [{rank: None} for rank in ranks]
    ready: dict[tuple[int, int, int], tuple[int, Move, Shares]] = {}
    owned: list[Shares | None] = [None] * len(plans)
    sent: Counter[int] = Counter()
    most_held = 1
    for time, steps in enumerate(zip_longest(*(plan.steps for plan in plans), fillvalue=Step())):
        arriving = meet(steps)
        sent.update(block for _, block in arriving)
        for rank, step in enumerate(steps):
            check_sends(rank, step, held[rank])
            if step.block is None:
                assert step.tiles == step.carry_out == ()
                assert step.carry_in is None
                continue
            assert step.block in held[rank], f"rank {rank} reads block {step.block}, which it does not hold"
            share: Shares = Counter({(rank, step.block): 1})
            if step.carry_in:
                sent_at, carried, arrived = ready.pop((step.carry_in.peer, rank, step.block))
                assert (step.carry_in.block, step.carry_in.rows) == (step.block, carried.rows)
                # A message that nobody takes up at once would hold its sender back.
                assert sent_at == time - 1, "accumulators follow one step behind"
                share += arrived
            keep(rank, step, share, owned)
            for move in step.carry_out:
                letter = (rank, move.peer, move.block)
                assert move.peer != rank
                assert letter not in ready, "two messages that look alike"
                ready[letter] = time, move, share
        for (rank, block), rows in arriving.items():
            assert block not in held[rank], f"block {block} comes to rank {rank}, which holds it"
            held[rank][block] = rows
        most_held = max(most_held, *map(len, held))
        for rank, step in enumerate(steps):
            for block in step.drops:
                del held[rank][block]
            still = {
                b for later in plans[rank].steps[time + 1 :] for b in (later.block, *(m.block for m in later.sends))
            }
            assert set(held[rank]) <= still, f"rank {rank} keeps blocks that it never needs again"
    return Trace(tuple(bring_home(plans, ready, owned)), sent, most_held)


def meet(steps: Sequence[Step]) -> dict[tuple[int, int], range | None]:
    """What arrives, by (rank, block), where every receive of a step has its send in the same step."""
    sends = Counter((rank, m.peer, m.block, m.rows) for rank, step in enumerate(steps) for m in step.sends)
    receives = Counter((m.peer, rank, m.block, m.rows) for rank, step in enumerate(steps) for m in step.receives)
    assert sends == receives
    assert all(count == 1 and sender != receiver for (sender, receiver, *_), count in sends.items())
    return {(rank, move.block): move.rows for rank, step in enumerate(steps) for move in step.receives}


def check_sends(rank: int, step: Step, held: dict[int, range | None]) -> None:
    for move in step.sends:
        assert move.block in held, f"rank {rank} sends block {move.block}, which it does not hold"
        # A part counts its owner's rows, so only the owner can cut it.
        assert move.rows is None or move.block == rank
        assert held[move.block] is None, "a part of a block goes no further than its first reader"


def keep(rank: int, step: Step, share: Shares, owned: list[Shares | None]) -> None:
    """Accumulators of a rank's own block stay, and there is one step that makes them."""
    if step.block == rank:
        assert owned[rank] is None, f"rank {rank} reads its own block in two steps"
        owned[rank] = share
    else:
        assert step.carry_out, f"rank {rank} has a share of block {step.block} and nobody to give it to"


def bring_home(
    plans: Sequence[Plan], ready: dict[tuple[int, int, int], tuple[int, Move, Shares]], owned: Sequence[Shares | None]
) -> list[Shares]:
    """Every rank's own accumulators with those that come home, and no letter is left over."""
    found = []
    for plan, own in zip(plans, owned, strict=True):
        assert own is not None, f"rank {plan.rank} has no step of its own"
        total = own.copy()
        for move in plan.home:
            assert move.block == plan.rank
            _, carried, shares = ready.pop((move.peer, plan.rank, plan.rank))
            assert carried.rows == move.rows
            total += shares
        found.append(total)
    assert not ready, f"accumulators that nobody takes: {sorted(ready)}"
    return found


def check_exchanges(plans: Sequence[Plan]) -> Trace:
    """Walk the plans; every reader's share of a block must reach its owner once, and nothing go further than needed."""
    trace = walk(plans)
    for rank, shares in enumerate(trace.owned):
        assert shares == {(p.rank, rank): 1 for p in plans for step in p.steps if step.block == rank}
    for plan in plans:
        for time, step in enumerate(plan.steps):
            for move in step.receives:
                later = plan.steps[time + 1 :]
                read = any(s.block == move.block and s.tiles for s in later)
                assert read or any(m.block == move.block for s in later for m in s.sends)
    return trace
