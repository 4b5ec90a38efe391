"""Plans of features that come later, made of the values and the schedule of today.

They are here to show that dilated attention, visiting queries, decoding and rings of rings need nothing but other
plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product

from ringcore.arrays import slice_of
from ringcore.layout import Layout
from ringcore.schedule import Visit, journeys, rotation
from ringcore.tiling import Piece, Visibility, pieces, tiles_between
from ringcore.values import Move, Plan, Step, Tile

Shard = Sequence[range]


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


def placed(row: Piece, column: Piece, visibility: Visibility, **where: slice) -> list[Tile]:
    """The tiles of two pieces for one batch entry, in the local rows of their shards; ``where`` are other fields."""
    found = tiles_between((row.positions,), (column.positions,), visibility)
    return [
        replace(tile, rows=_within(row.local, tile.rows), columns=_within(column.local, tile.columns), **where)
        for tile in found
    ]


def _within(outer: slice, inner: slice) -> slice:
    return slice_of(range(outer.start, outer.stop, outer.step)[inner])


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
