"""Other ways around a ring: first through each host, or both ways at once.

Everything here is plain Python over shapes and keywords; no array is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TypeAlias

from ringcore.errors import KeywordError
from ringcore.integers import is_integer
from ringcore.layout import Layout
from ringcore.schedule import Visit, journeys, part_of_shard, ring_plans, straight_if_less
from ringcore.tiling import Visibility, tiles_between
from ringcore.values import Move, Plan, Step, Tile

RING, DOUBLE, BIDIRECTIONAL = SCHEDULES = "ring", "double", "bidirectional"


@dataclass(frozen=True)
class DoubleRing:
    """Rings of so many ranks in a row, and a ring of those rings: what ``schedule="double"`` finds out by itself."""

    ranks: int


Schedule: TypeAlias = str | DoubleRing


def check_schedule(schedule: object) -> None:
    """Raise KeywordError unless this is the name of a schedule, or a `DoubleRing`."""
    if isinstance(schedule, DoubleRing) and is_integer(schedule.ranks) and schedule.ranks >= 1:
        return
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise KeywordError(
            f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}, or ringcore.DoubleRing(ranks), of so "
            "many ranks in each inner ring."
        )


def resolve_schedule(schedule: Schedule, size: int, nodes: Sequence[int] | None) -> Schedule:
    """The schedule with its numbers; ``nodes`` says of each rank where it is, None where all are in this process.

    Raises KeywordError if the ranks of this ring do not lie as it asks.
    """
    if schedule == DOUBLE:
        if nodes is None:
            raise KeywordError(
                'schedule is "double", but all ranks are in this process. Say how many are to be together: '
                "schedule=ringcore.DoubleRing(ranks)."
            )
        inner = next((rank for rank in range(size) if nodes[rank] != nodes[0]), size)
        machines = [set(nodes[first : first + inner]) for first in range(0, size, inner)]
        if size % inner or len(set(nodes)) != len(machines) or any(len(found) > 1 for found in machines):
            raise KeywordError(
                f'schedule is "double", but the ranks are on machines {list(nodes)}: each must have as many, one after '
                "the other. Order the ranks by machine, or say schedule=ringcore.DoubleRing(ranks)."
            )
        return DoubleRing(inner)
    if isinstance(schedule, DoubleRing) and size % schedule.ranks:
        raise KeywordError(f"schedule has inner rings of {schedule.ranks} ranks, which do not divide the {size} ranks.")
    return schedule


@lru_cache(maxsize=256)
def scheduled_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility, schedule: Schedule) -> tuple[Plan, ...]:
    """Every rank's plan where k and v visit by this schedule, or straight where that moves less."""
    if schedule == RING:
        return ring_plans(q_layout, k_layout, visibility)
    if isinstance(schedule, DoubleRing):
        around = double_ring_plans(q_layout, k_layout, visibility, schedule.ranks)
    else:
        around = both_ways_plans(q_layout, k_layout, visibility)
    return straight_if_less(around, q_layout, k_layout, visibility)


def double_ring_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility, inner: int) -> tuple[Plan, ...]:
    """A block visits the ranks of one inner ring, one after the other, and meanwhile moves on to the next ring.

    So it goes from one inner ring to another once for each, and every rank sends there at the same time.
    Source: Gu et al. 2024 (LoongTrain), arXiv:2406.18485.
    """
    size = q_layout.size
    outer = size // inner

    def tiles(resident: int, visitor: int) -> tuple[Tile, ...]:
        return tiles_between(q_layout.shards[resident], k_layout.shards[visitor], visibility)

    def visits(owner: int) -> Iterator[Visit]:
        def guest(turn: int, hop: int) -> int:
            return (owner // inner + turn) % outer * inner + (owner + hop) % inner

        wanted = [(turn, hop) for turn in range(outer) for hop in range(inner) if tiles(guest(turn, hop), owner)]
        for turn, hop in product(range(outer), range(inner)):
            # The first rank of an inner ring passes the block on to the next one, the others to their neighbour.
            due = any(there == turn and then >= hop for there, then in wanted)
            due = due or (hop == 0 and any(there > turn for there, _ in wanted))
            if due and (turn, hop) != (0, 0):
                giver = (turn, hop - 1) if hop else (turn - 1, 0)
                yield Visit(turn * inner + hop, guest(turn, hop), guest(*giver), giver[0] * inner + giver[1])

    return journeys([list(visits(owner)) for owner in range(size)], tiles)


def both_ways_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """The first half of each block goes to the next ranks, the second half to the ones before, both at once."""
    size = k_layout.size
    halves = [(range(length - length // 2), range(length - length // 2, length)) for length in k_layout.lengths]
    table: dict[tuple[int, int, int], tuple[Tile, ...]] = {}
    for resident, owner, way in product(range(size), range(size), (0, 1)):
        part = part_of_shard(k_layout.shards[owner], halves[owner][way])
        table[resident, owner, way] = tiles_between(q_layout.shards[resident], part, visibility)
    # How far each half goes: the last one that sees a part of it.
    far = [
        tuple(
            max((hop for hop in range(1, size) if table[(owner + sign * hop) % size, owner, way]), default=0)
            for way, sign in enumerate((1, -1))
        )
        for owner in range(size)
    ]

    def plan(rank: int) -> Plan:
        own = tiles_between(q_layout.shards[rank], k_layout.shards[rank], visibility)
        steps = [Step(rank, own, *moves(rank, 0), drops=((rank, None),))]
        for hop in range(1, size):
            first, second = (visit(rank, hop, way, sign) for way, sign in enumerate((1, -1)))
            sends, receives = moves(rank, hop)
            steps += [replace(first, sends=sends, receives=receives, holds=True), second]
        homes = sorted((2 * hops + way, way, hops) for way, hops in enumerate(far[rank]) if hops)
        home = (Move((rank + (1, -1)[way] * hops) % size, rank, halves[rank][way]) for _, way, hops in homes)
        return Plan(rank, size, tuple(steps), tuple(home))

    def moves(rank: int, hop: int) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
        sends, receives = [], []
        for way, sign in enumerate((1, -1)):
            block, coming = (rank - sign * hop) % size, (rank - sign * (hop + 1)) % size
            if hop < far[block][way]:
                sends.append(Move((rank + sign) % size, block, halves[block][way]))
            if hop < far[coming][way]:
                receives.append(Move((rank - sign) % size, coming, halves[coming][way]))
        return tuple(sends), tuple(receives)

    def visit(rank: int, hop: int, way: int, sign: int) -> Step:
        block = (rank - sign * hop) % size
        if hop > far[block][way]:
            return Step()
        half = halves[block][way]
        peer = (rank + sign) % size if hop < far[block][way] else block
        return Step(
            block,
            table[rank, block, way],
            carry_in=Move((rank - sign) % size, block, half) if hop > 1 else None,
            carry_out=(Move(peer, block, half),),
            drops=((block, half),),
            rows=half,
        )

    return tuple(map(plan, range(size)))
