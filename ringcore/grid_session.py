"""Where a call on a grid runs: heads are traded for rows inside a group, and the ring runs between groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from ringcore.agreement import Agreed
from ringcore.arguments import Arguments
from ringcore.grid import Grid
from ringcore.protocols import Transport
from ringcore.replicated import add_all
from ringcore.ring import Work
from ringcore.session import Agreeing, Side, dealt, gathered, run_plans, visibility_of
from ringcore.trading import TradeWork, empty, heads_as_rows, rows_as_heads, trade_plans
from ringcore.values import Array, Blocks


class GridSession(Agreeing):
    """This rank of a grid: it computes its part of the heads, for the rows of all ranks of its group."""

    def __init__(self, grid: Grid, arguments: Arguments, agreed: Agreed) -> None:
        super().__init__(grid, agreed)
        self.grid, self.ranks = grid, (grid.ring.rank,)
        heads, key_heads = (x.shape[1] // grid.heads.size for x in (arguments.q, arguments.k))
        visibility = visibility_of(arguments, sum(agreed.q_lengths), sum(agreed.k_lengths))
        visibility = replace(visibility, heads=heads, key_heads=key_heads)
        layouts = arguments.q_layout, arguments.k_layout
        self.deal = dealt(*layouts, agreed.q_lengths, agreed.k_lengths, visibility, group=grid.heads.size)
        first = grid.ring.rank * grid.heads.size
        self._lengths: dict[Side, tuple[int, ...]] = {
            "q": agreed.q_lengths[first : first + grid.heads.size],
            "k": agreed.k_lengths[first : first + grid.heads.size],
        }

    def heads(self, count: int) -> slice:
        """This rank's part of them."""
        return self.grid.part(count)

    def anywhere(self, given: bool) -> bool:
        """Whether it is to any rank of the group."""
        return b"1" in self.grid.heads.gather(b"1" if given else b"0")

    def split(self, side: Side, arrays: Sequence[Array | None]) -> list[tuple[Array | None, ...]]:
        """The group's rows of this rank's heads."""
        return [_of_each(arrays, lambda wide: heads_for_rows(self.grid.heads, wide, self._lengths[side]))]

    def join(self, side: Side, parts: Sequence[Blocks]) -> Blocks:
        """This rank's rows of all heads."""
        (given,) = parts
        return _of_each(given, lambda wide: rows_for_heads(self.grid.heads, wide, self._lengths[side]))

    def run(self, works: Sequence[Work]) -> list[Blocks | None]:
        """Run this rank's loop, around the ring between groups."""
        (work,) = works
        return [run_plans(self.grid.ring, self.deal.plans, work)]

    def sum_over_ranks(self, arrays: Blocks) -> Blocks:
        """The sum over the group, and that over the ring of the sums."""
        for transport in (self.grid.heads, self.grid.ring):
            arrays = tuple(map(add_all, zip(*gathered(transport, arrays), strict=True)))
        return arrays


def _of_each(arrays: Sequence[Array | None], trade: Callable[[Sequence[Array]], Blocks]) -> tuple[Any, ...]:
    """What ``trade`` makes of arrays with four axes, for arrays with three or four; one that comes twice goes once."""
    once = {id(x): x for x in arrays if x is not None}
    came = trade([x if x.ndim == 4 else x[..., None] for x in once.values()])
    found = dict(zip(once, came, strict=True))
    return tuple(None if x is None else found[id(x)] if x.ndim == 4 else found[id(x)][..., 0] for x in arrays)


def heads_for_rows(group: Transport, arrays: Sequence[Array], lengths: Sequence[int]) -> Blocks:
    """Arrays [B, H, S, D] of this rank's rows as [B, H / ranks, rows of all ranks, D]."""
    if group.size == 1:
        return tuple(arrays)
    ends = [0, *accumulate(lengths)]
    widths = [x.shape[3] for x in arrays]
    given = tuple(heads_as_rows(x, group.size) for x in arrays)
    into = [empty((x.shape[0], ends[-1], 1, x.shape[3]), x) for x in given]

    def place(owner: int) -> tuple[Any, ...]:
        return slice(None), slice(ends[owner], ends[owner + 1]), ...

    def shapes(owner: int) -> list[tuple[int, ...]]:
        return [(x.shape[0], lengths[owner], *x.shape[2:]) for x in given]

    parts = tuple(range(rank, rank + 1) for rank in range(group.size))
    plans = trade_plans(parts, tuple(length > 0 for length in lengths))
    work = TradeWork(given, into, [place] * len(given), plans[group.rank], parts[group.rank], shapes)
    run_plans(group, plans, work)
    return tuple(rows_as_heads(x, width) for x, width in zip(work.into, widths, strict=True))


def rows_for_heads(group: Transport, arrays: Sequence[Array], lengths: Sequence[int]) -> Blocks:
    """Arrays [B, H / ranks, rows of all ranks, D] as [B, H, S, D] of this rank's rows: `heads_for_rows` backwards."""
    if group.size == 1:
        return tuple(arrays)
    ends = [0, *accumulate(lengths)]
    mine = lengths[group.rank]
    into = [empty((x.shape[0], x.shape[1] * group.size, mine, x.shape[3]), x) for x in arrays]

    def place_in(heads: int) -> Callable[[int], tuple[Any, ...]]:
        return lambda owner: (slice(None), slice(owner * heads, (owner + 1) * heads), ...)

    parts = tuple(range(*run) for run in pairwise(ends))
    plans = trade_plans(parts, (ends[-1] > 0,) * group.size)
    places = [place_in(x.shape[1]) for x in arrays]
    shapes = [tuple(x.shape) for x in arrays]
    work = TradeWork(tuple(arrays), into, places, plans[group.rank], parts[group.rank], lambda owner: shapes)
    run_plans(group, plans, work)
    return tuple(work.into)
