"""Plans of features that come later, made of the values and the schedule of today.

They are here to show that documents, halos, dilated attention, visiting queries, decoding and rings of rings need
nothing but other plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise, product, zip_longest

from ringcore.arrays import slice_of
from ringcore.layout import Layout
from ringcore.schedule import Piece, Visibility, pieces, rotation, tiles_between
from ringcore.values import Move, Plan, Step, Tile

Shard = Sequence[range]
Tiles = Callable[[int, int], tuple[Tile, ...]]


def document_plans(
    q_layout: Layout, k_layout: Layout, visibility: Visibility, documents: Sequence[Sequence[int]]
) -> tuple[Plan, ...]:
    """Queries see the keys of their own document: ``documents[entry][position]``."""

    def tiles(resident: int, visitor: int) -> tuple[Tile, ...]:
        found: list[Tile] = []
        for entry, ids in enumerate(documents):
            runs = product(_runs(q_layout.shards[resident], ids), _runs(k_layout.shards[visitor], ids))
            for (document, row), (other, column) in runs:
                if document == other:
                    found += placed(row, column, visibility, batch=slice(entry, entry + 1))
        return tuple(found)

    return rotation(q_layout.size, tiles)


def dilated_plans(layout: Layout, branches: Sequence[tuple[int, int]], visibility: Visibility) -> tuple[Plan, ...]:
    """Branches (segment length, dilation rate), a multiset of keys: Ding et al. 2023, arXiv:2307.02486."""

    def tiles(resident: int, visitor: int) -> tuple[Tile, ...]:
        found: list[Tile] = []
        for length, rate in branches:
            for offset, start in product(range(min(rate, visibility.heads)), range(0, layout.length, length)):
                chosen = range(start + offset, min(start + length, layout.length), rate)
                rows, columns = (_common(layout.shards[rank], chosen) for rank in (resident, visitor))
                for (q_heads, k_heads), row, column in product(_heads(offset, rate, visibility), rows, columns):
                    found += placed(row, column, visibility, q_heads=q_heads, k_heads=k_heads)
        return tuple(found)

    return rotation(layout.size, tiles)


def visiting_query_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """k and v stay, q visits, and its partial is carried home."""
    return rotation(
        q_layout.size,
        lambda resident, visitor: tiles_between(q_layout.shards[visitor], k_layout.shards[resident], visibility),
    )


def decode_plans(queries: int, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Every rank has all of q, so nothing visits; every rank's partial goes to every other."""

    def plan(rank: int) -> Plan:
        others = [(rank + hop) % k_layout.size for hop in range(1, k_layout.size)]
        step = Step(
            block=rank,
            tiles=tiles_between((range(queries),), k_layout.shards[rank], visibility),
            carry_out=tuple(Move(peer, peer) for peer in others),
            drops=(rank,),
        )
        return Plan(rank, k_layout.size, (step,), home=tuple(Move(peer, rank) for peer in sorted(others)))

    return tuple(plan(rank) for rank in range(k_layout.size))


def halo_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Only the rows of k and v that a window reaches travel, from their owner straight to the rank that reads them."""
    size = k_layout.size
    parts: dict[tuple[int, int], range] = {}
    for resident, owner in product(range(size), repeat=2):
        seen = tiles_between(q_layout.shards[resident], k_layout.shards[owner], visibility)
        if seen and resident != owner:
            parts[resident, owner] = _hull(seen)

    def tiles(resident: int, owner: int) -> tuple[Tile, ...]:
        shard = k_layout.shards[owner]
        if (resident, owner) in parts:
            shard = _cut(shard, parts[resident, owner])
        elif resident != owner:
            return ()
        return tiles_between(q_layout.shards[resident], shard, visibility)

    def visits(owner: int) -> Iterator[Visit]:
        for hop in range(1, size):
            guest = (owner + hop) % size
            if (guest, owner) in parts:
                yield Visit(hop, guest, giver=owner, sent=hop - 1, rows=parts[guest, owner])

    return journeys([list(visits(owner)) for owner in range(size)], tiles)


def double_ring_plans(hosts: int, q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """A block visits the ranks of one host, one after the other, and meanwhile moves on to the next host."""
    size = q_layout.size
    inside = size // hosts

    def tiles(resident: int, visitor: int) -> tuple[Tile, ...]:
        return tiles_between(q_layout.shards[resident], k_layout.shards[visitor], visibility)

    def visits(owner: int) -> Iterator[Visit]:
        def guest(turn: int, hop: int) -> int:
            return (owner // inside + turn) % hosts * inside + (owner + hop) % inside

        wanted = [(turn, hop) for turn in range(hosts) for hop in range(inside) if tiles(guest(turn, hop), owner)]
        for turn, hop in product(range(hosts), range(inside)):
            # The first rank of a host passes the block on to the next host, the others to their neighbour.
            due = any(there == turn and then >= hop for there, then in wanted)
            due = due or (hop == 0 and any(there > turn for there, _ in wanted))
            if due and (turn, hop) != (0, 0):
                giver = (turn, hop - 1) if hop else (turn - 1, 0)
                yield Visit(turn * inside + hop, guest(turn, hop), guest(*giver), giver[0] * inside + giver[1])

    return journeys([list(visits(owner)) for owner in range(size)], tiles)


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
    drops: list[int] = field(default_factory=list)

    def step(self) -> Step:
        lists = (self.sends, self.receives, self.carry_out, self.drops)
        sends, receives, carry_out, drops = (tuple(x) for x in lists)
        return Step(self.block, self.tiles, sends, receives, self.carry_in, carry_out, drops)


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
            draft.block, draft.tiles = owner, tiles(visit.guest, owner)
            if following and following.step == visit.step + 1 and visit.rows is None:
                draft.carry_out.append(Move(following.guest, owner))
                drafts[following.guest][following.step].carry_in = Move(visit.guest, owner)
            else:
                draft.carry_out.append(Move(owner, owner, visit.rows))
                homes[owner].append(Move(visit.guest, owner, visit.rows))
    for rank in range(size):
        last = {b: t for t, draft in enumerate(drafts[rank]) for b in (draft.block, *(m.block for m in draft.sends))}
        for block, time in last.items():
            if block is not None:
                drafts[rank][time].drops.append(block)
    return tuple(
        Plan(rank, size, tuple(draft.step() for draft in drafts[rank]), tuple(homes[rank])) for rank in range(size)
    )


def placed(row: Piece, column: Piece, visibility: Visibility, **where: slice) -> list[Tile]:
    """The tiles of two pieces for one batch entry, in the local rows of their shards; ``where`` are other fields."""
    found = tiles_between((row.positions,), (column.positions,), visibility)
    return [
        replace(tile, rows=_within(row.local, tile.rows), columns=_within(column.local, tile.columns), **where)
        for tile in found
    ]


def _within(outer: slice, inner: slice) -> slice:
    return slice_of(range(outer.start, outer.stop, outer.step)[inner])


def _runs(shard: Shard, ids: Sequence[int]) -> Iterator[tuple[int, Piece]]:
    """The longest pieces of a shard within one document, each with its document."""
    for piece in pieces(shard):
        start = 0
        for document, run in groupby(ids[position] for position in piece.positions):
            part = slice(start, start := start + len(list(run)), 1)
            yield document, Piece(_within(piece.local, part), piece.positions[part])


def _common(shard: Shard, chosen: range) -> Iterator[Piece]:
    """The chosen positions that a shard holds."""
    for piece in pieces(shard):
        places = [place for place, position in enumerate(piece.positions) if position in chosen]
        if places:
            step = places[1] - places[0] if len(places) > 1 else 1
            part = slice(places[0], places[-1] + 1, step)
            yield Piece(_within(piece.local, part), piece.positions[part])


def _heads(offset: int, rate: int, visibility: Visibility) -> list[tuple[slice, slice]]:
    """The heads of one offset, (query heads, key heads), in as few tiles as can say which key head each one reads."""
    group = visibility.heads // visibility.key_heads
    heads = range(offset, visibility.heads, rate)
    read = {key: [head for head in heads if head // group == key] for key in range(visibility.key_heads)}
    read = {key: members for key, members in read.items() if members}
    steps = {b - a for a, b in pairwise(read)}
    if len({len(members) for members in read.values()}) == 1 and len(steps) <= 1:
        return [(slice_of(heads), slice(min(read), max(read) + 1, *(steps or {1})))]
    return [(slice(m[0], m[-1] + 1, rate), slice(key, key + 1)) for key, m in read.items()]


def _hull(tiles: Sequence[Tile]) -> range:
    """The shortest run of local columns that holds all that the tiles show."""
    seen = [
        range(tile.columns.start, tile.columns.stop, tile.columns.step)[
            slice(*tile.band.columns(0, tile.height, tile.width))
        ]
        for tile in tiles
    ]
    return range(min(places[0] for places in seen), max(places[-1] for places in seen) + 1)


def _cut(shard: Shard, rows: range) -> tuple[range, ...]:
    """The ranges of a part of a shard."""
    found = []
    for piece in pieces(shard):
        first, last = max(rows.start, piece.local.start), min(rows.stop, piece.local.stop)
        if first < last:
            found.append(piece.positions[first - piece.local.start : last - piece.local.start])
    return tuple(found)
