"""Plans of features that come later, made of the values and the schedule of today.

They are here to show that decoding and rings of rings need nothing but other plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ringcore.layout import Layout
from ringcore.schedule import Visit, journeys
from ringcore.tiling import Visibility, tiles_between
from ringcore.values import Move, Plan, Step, Tile


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
