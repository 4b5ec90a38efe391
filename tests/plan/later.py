"""Plans of features that come later, made of the values and the schedule of today.

They are here to show that decoding needs nothing but other plans.
"""

from __future__ import annotations

from ringcore.layout import Layout
from ringcore.tiling import Visibility, tiles_between
from ringcore.values import Move, Plan, Step


def decode_plans(queries: int, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Every rank has all of q, so nothing visits; every rank's partial goes to every other."""

    def plan(rank: int) -> Plan:
        others = [(rank + hop) % k_layout.size for hop in range(1, k_layout.size)]
        step = Step(
            block=rank,
            tiles=tiles_between((range(queries),), k_layout.shards[rank], visibility),
            carry_out=tuple(Move(peer, peer) for peer in others),
            drops=((rank, None),),
        )
        return Plan(rank, k_layout.size, (step,), home=tuple(Move(peer, rank) for peer in sorted(others)))

    return tuple(plan(rank) for rank in range(k_layout.size))
