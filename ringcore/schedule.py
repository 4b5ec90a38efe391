"""Plans: in which order a rank computes its tiles, and which blocks move meanwhile.

Everything here is plain Python over shapes and keywords; no array is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import product, zip_longest

from ringcore.layout import Layout
from ringcore.tiling import Visibility, pieces, tiles_between
from ringcore.values import Held, Move, Plan, Step, Tile, span

Tiles = Callable[[int, int], tuple[Tile, ...]]
"""The tiles of a visitor's block at a resident rank: ``tiles(resident, visitor)``."""


@lru_cache(maxsize=256)
def ring_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Every rank's plan where k and v visit and q stays.

    Blocks pass around the ring, as far as some rank sees a part of them. Where queries see only keys near them or of
    their document, and it moves less, the rows that a rank reads come straight from their owner.
    """
    return straight_if_less(one_ring_plans(q_layout, k_layout, visibility), q_layout, k_layout, visibility)


def straight_if_less(
    around: tuple[Plan, ...], q_layout: Layout, k_layout: Layout, visibility: Visibility
) -> tuple[Plan, ...]:
    """These plans, or rows straight from their owner where queries see few of them, and it moves less."""
    if not visibility.near:
        return around
    straight = halo_plans(q_layout, k_layout, visibility)
    return min(around, straight, key=lambda plans: rows_moved(plans, k_layout)[0])


def one_ring_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Every rank's plan where k and v pass from each rank to the next one."""

    @cache
    def tiles(resident: int, visitor: int) -> tuple[Tile, ...]:
        return tiles_between(q_layout.shards[resident], k_layout.shards[visitor], visibility)

    def rows(visitor: int) -> range | None:
        guests = (resident for resident in range(q_layout.size) if resident != visitor)
        seen = span(tile for guest in guests for tile in tiles(guest, visitor))
        return None if len(seen) in (0, k_layout.lengths[visitor]) else seen

    return rotation(q_layout.size, tiles, [rows(visitor) for visitor in range(q_layout.size)])


def query_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Every rank's plan where k and v stay, q visits, and what its rows saw is carried home."""
    plans = rotation(
        q_layout.size,
        lambda resident, visitor: tiles_between(q_layout.shards[visitor], k_layout.shards[resident], visibility),
    )
    return tuple(replace(plan, queries_visit=True) for plan in plans)


def rows_moved(plans: Sequence[Plan], layout: Layout) -> tuple[int, int]:
    """How many rows of visiting blocks all ranks send, and for how many rows accumulators go on or home."""

    def rows(moves: Iterable[Move]) -> int:
        return sum(layout.lengths[move.block] if move.rows is None else len(move.rows) for move in moves)

    steps = [step for plan in plans for step in plan.steps]
    return rows(move for step in steps for move in step.sends), rows(move for step in steps for move in step.carry_out)


def halo_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Only rows of k and v that a rank reads travel, from their owner straight to it; their gradients likewise."""
    size = k_layout.size
    parts: dict[tuple[int, int], range] = {}
    for resident, owner in product(range(size), repeat=2):
        seen = tiles_between(q_layout.shards[resident], k_layout.shards[owner], visibility)
        if seen and resident != owner:
            parts[resident, owner] = _hull(seen)

    def tiles(resident: int, owner: int) -> tuple[Tile, ...]:
        shard = k_layout.shards[owner]
        if (resident, owner) in parts:
            shard = part_of_shard(shard, parts[resident, owner])
        elif resident != owner:
            return ()
        return tiles_between(q_layout.shards[resident], shard, visibility)

    def visits(owner: int) -> Iterator[Visit]:
        for hop in range(1, size):
            guest = (owner + hop) % size
            if (guest, owner) in parts:
                yield Visit(hop, guest, giver=owner, sent=hop - 1, rows=parts[guest, owner])

    return journeys([list(visits(owner)) for owner in range(size)], tiles)


def rotation(size: int, tiles: Tiles, rows: Sequence[range | None] | None = None) -> tuple[Plan, ...]:
    """Every rank's plan in a ring where each rank's block visits the next ranks, one after the other.

    The accumulators of a block follow it from its first guest on, and return to its owner from the last: those of its
    ``rows`` that guests see, None is all.
    """
    table = {(resident, visitor): tiles(resident, visitor) for resident, visitor in product(range(size), repeat=2)}
    hops = [max((hop for hop in range(size) if table[(o + hop) % size, o]), default=0) for o in range(size)]
    carried = [None] * size if rows is None else rows
    return tuple(_rotating_plan(rank, size, hops, carried, table) for rank in range(size))


def _rotating_plan(
    rank: int, size: int, hops: list[int], rows: Sequence[range | None], table: dict[tuple[int, int], tuple[Tile, ...]]
) -> Plan:
    after, before = (rank + 1) % size, (rank - 1) % size
    steps = []
    for hop in range(size):
        block, coming = (rank - hop) % size, (rank - hop - 1) % size
        goes_on = hop < hops[block]
        receives = (Move(before, coming),) if hop < hops[coming] else ()
        if hop > hops[block]:
            steps.append(Step(receives=receives))
            continue
        steps.append(
            Step(
                block=block,
                tiles=table[rank, block],
                sends=(Move(after, block),) if goes_on else (),
                receives=receives,
                carry_in=Move(before, block, rows[block]) if hop >= 2 else None,
                carry_out=(Move(after if goes_on else block, block, rows[block]),) if hop else (),
                drops=((block, None),),
            )
        )
    home = (Move((rank + hops[rank]) % size, rank, rows[rank]),) if hops[rank] else ()
    return Plan(rank, size, tuple(steps), home)


@dataclass(frozen=True)
class Visit:
    """A stop of a block: ``guest`` reads it in ``step``; ``giver`` sent it in step ``sent``, whole or these rows."""

    step: int
    guest: int
    giver: int
    sent: int
    rows: range | None = None


@dataclass
class _Draft:
    block: int | None = None
    tiles: tuple[Tile, ...] = ()
    carry_in: Move | None = None
    sends: list[Move] = field(default_factory=list)
    receives: list[Move] = field(default_factory=list)
    carry_out: list[Move] = field(default_factory=list)
    drops: list[Held] = field(default_factory=list)
    rows: range | None = None

    def step(self) -> Step:
        sends, receives, carry_out = (tuple(moves) for moves in (self.sends, self.receives, self.carry_out))
        return Step(self.block, self.tiles, sends, receives, self.carry_in, carry_out, tuple(self.drops), self.rows)

    def uses(self, rank: int) -> Iterator[Held]:
        if self.block is not None:
            yield self.block, self.rows
        for move in self.sends:
            yield move.block, None if move.block == rank else move.rows


def journeys(visits: Sequence[Sequence[Visit]], tiles: Tiles) -> tuple[Plan, ...]:
    """Every rank's plan, given where each rank's block goes after its own rank read it in step 0.

    Accumulators follow a whole block where its next visit is one step later, and else go home.
    """
    size = len(visits)
    count = 1 + max((visit.step for stops in visits for visit in stops), default=0)
    drafts = [[_Draft() for _ in range(count)] for _ in range(size)]
    homes: list[list[Move]] = [[] for _ in range(size)]
    for owner, stops in enumerate(visits):
        drafts[owner][0].block, drafts[owner][0].tiles = owner, tiles(owner, owner)
        for visit, following in zip_longest(stops, stops[1:]):
            drafts[visit.giver][visit.sent].sends.append(Move(visit.guest, owner, visit.rows))
            drafts[visit.guest][visit.sent].receives.append(Move(visit.giver, owner, visit.rows))
            draft = drafts[visit.guest][visit.step]
            draft.block, draft.tiles, draft.rows = owner, tiles(visit.guest, owner), visit.rows
            if following and following.step == visit.step + 1 and visit.rows is None:
                draft.carry_out.append(Move(following.guest, owner))
                drafts[following.guest][following.step].carry_in = Move(visit.guest, owner)
            else:
                draft.carry_out.append(Move(owner, owner, visit.rows))
                homes[owner].append(Move(visit.guest, owner, visit.rows))
    for rank in range(size):
        last = {held: time for time, draft in enumerate(drafts[rank]) for held in draft.uses(rank)}
        for held, time in last.items():
            drafts[rank][time].drops.append(held)
    return tuple(
        Plan(rank, size, tuple(draft.step() for draft in drafts[rank]), tuple(homes[rank])) for rank in range(size)
    )


def _hull(tiles: Sequence[Tile]) -> range:
    """The shortest run of local columns that holds all that the tiles show."""
    seen = [
        range(tile.columns.start, tile.columns.stop, tile.columns.step)[
            slice(*tile.band.columns(0, tile.height, tile.width))
        ]
        for tile in tiles
    ]
    return range(min(places[0] for places in seen), max(places[-1] for places in seen) + 1)


def part_of_shard(shard: Sequence[range], rows: range) -> tuple[range, ...]:
    """The ranges of a part of a shard."""
    found = []
    for piece in pieces(shard):
        first, last = max(rows.start, piece.local.start), min(rows.stop, piece.local.stop)
        if first < last:
            found.append(piece.positions[first - piece.local.start : last - piece.local.start])
    return tuple(found)
