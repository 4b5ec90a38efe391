"""Layouts that give every rank the same work: pieces of the sequence, dealt by what their rows see."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

from ringcore.documents import read_documents
from ringcore.errors import KeywordError, LayoutError
from ringcore.integers import integers_of_entries, is_integer
from ringcore.keywords import check_flag, check_window
from ringcore.layout import NAMED, Layout
from ringcore.schedule import ring_plans
from ringcore.tiling import Visibility, tiles_between
from ringcore.values import Band, Plan, Tile

LAUNCH = 500_000
"""Visible pairs of 16 heads of 128 columns that a GPU of 2024 computes while it starts on one more tile."""

_MOST = 8  # pieces of a rank
_ROUNDS = 200  # of exchanging two pieces


def balanced(
    length: int,
    size: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | int | None = None,
    documents: Any = None,
    cu_seqlens: Any = None,
    key_lengths: Sequence[int] | None = None,
    pieces: int = _MOST,
    launch: int = LAUNCH,
) -> Layout:
    """The layout of ``length`` positions over ``size`` ranks that gives each the same work in such a call.

    Every rank holds the same number of equally long pieces, at most ``pieces``, so that memory is even too. The work of
    a rank is the (query, key) pairs that its rows see, and ``launch`` pairs more for each tile. Of ``pieces``, half as
    many, a quarter and so on, the number is taken with which the most loaded rank has the least work.

    causal, window, documents, cu_seqlens, key_lengths: as in `ringcore.ring_attention`, for q and k of this length. Use
    the layout for `ringcore.shard` and as ``layout=``; equal arguments give equal layouts on every rank.

    Raises KeywordError or LayoutError for what cannot be meant.
    """
    for name, value in (("length", length), ("size", size), ("pieces", pieces), ("launch", launch)):
        least = 0 if name in ("length", "launch") else 1
        if not is_integer(value) or value < least:
            raise KeywordError(f"{name} is {value!r}; it must be a whole number, {least} or more.")
    check_flag("causal", causal)
    found = read_documents(documents, cu_seqlens)
    if found is not None and found.length != length:
        raise LayoutError(f"the documents end at position {found.length}, but the layout is of {length} positions.")
    entries = 1 if found is None else len(found.runs)
    limits = (length,) * entries
    if key_lengths is not None:
        entries = entries if entries > 1 else len(key_lengths)
        limits = tuple(integers_of_entries("key_lengths", key_lengths, entries, one_for_all=False))
    visibility = Visibility(
        causal, check_window(window, causal), (0,) * entries, limits, heads=1, key_heads=1,
        documents=None if found is None else found.of_entries(entries),
    )  # fmt: skip
    counts = [pieces >> shift for shift in reversed(range(pieces.bit_length()))]
    candidates = [_dealt(length, size, count, visibility, launch) for count in counts]
    return min(candidates, key=lambda layout: max(loads(ring_plans(layout, layout, visibility), launch)))


@lru_cache(maxsize=64)
def lightest(visibility: Visibility, q_length: int, k_length: int, size: int) -> tuple[Layout, Layout]:
    """Of named and balanced layouts those for q and for k and v with which the most loaded rank has the least work."""
    pairs_of_layouts = [(deal(q_length, size), deal(k_length, size)) for deal in NAMED.values()]
    if q_length == k_length:
        dealt = [_dealt(q_length, size, 1 << shift, visibility, LAUNCH) for shift in range(_MOST.bit_length())]
        pairs_of_layouts += zip(dealt, dealt, strict=True)
    return min(pairs_of_layouts, key=lambda both: max(loads(ring_plans(*both, visibility))))


def loads(plans: Sequence[Plan], launch: int = LAUNCH) -> list[int]:
    """The work of each rank: pairs for each head, and ``launch`` more for each tile.

    A tile of some heads alone, as dilated attention has them, counts as their share of all.
    """
    heads = max((tile.q_heads.stop for plan in plans for tile in plan.tiles), default=1)
    return [_work(plan.tiles, heads, launch) for plan in plans]


def _work(tiles: Sequence[Tile], heads: int, launch: int) -> int:
    return sum((pairs(tile) + launch) * tile.heads for tile in tiles) // heads


def pairs(tile: Tile) -> int:
    """How many (query, key) pairs of a tile are visible, over its batch entries, for one head."""
    entries: int = tile.batch.stop - tile.batch.start
    return entries * _area(tile.band, tile.height, tile.width)


def _dealt(length: int, size: int, count: int, visibility: Visibility, launch: int) -> Layout:
    """``count`` pieces for each rank: the largest first, to whom has least; then exchanged while that helps."""
    parts = size * count
    cuts = [length * part // parts for part in range(parts + 1)]
    work = []
    for start, stop in pairwise(cuts):
        tiles = tiles_between((range(start, stop),), (range(length),), visibility)
        work.append(_work(tiles, visibility.heads, launch))
    held: list[list[int]] = [[] for _ in range(size)]
    sums = [0] * size
    for part in sorted(range(parts), key=lambda part: (-work[part], part)):
        rank = min((rank for rank in range(size) if len(held[rank]) < count), key=lambda rank: (sums[rank], rank))
        held[rank].append(part)
        sums[rank] += work[part]
    _exchange(held, sums, work)
    return Layout(tuple(_ranges(cuts, sorted(parts)) for parts in held), "balanced")


def _exchange(held: list[list[int]], sums: list[int], work: Sequence[int]) -> None:
    """Between the rank that has most and any other, exchange the two pieces that bring both nearest together."""
    for _ in range(_ROUNDS):
        most = max(range(len(sums)), key=lambda rank: sums[rank])
        gains = []
        for rank in range(len(sums)):
            gap = sums[most] - sums[rank]
            for mine, other in product(held[most], held[rank]):
                gains.append((abs(gap - 2 * (work[mine] - work[other])) - gap, rank, mine, other))
        gain, rank, mine, other = min(gains)
        if gain >= 0:
            return
        held[most][held[most].index(mine)], held[rank][held[rank].index(other)] = other, mine
        sums[most] -= work[mine] - work[other]
        sums[rank] += work[mine] - work[other]


def _ranges(cuts: Sequence[int], parts: Sequence[int]) -> tuple[range, ...]:
    """The positions of these pieces, neighbours as one range."""
    found: list[range] = []
    for part in parts:
        start = cuts[part]
        if found and found[-1].stop == start:
            start = found.pop().start
        found.append(range(start, cuts[part + 1]))
    return tuple(found)


def _area(band: Band, height: int, width: int) -> int:
    below = 0 if band.lo is None else _below(band.lo - 1, height, width)
    return (height * width if band.hi is None else _below(band.hi, height, width)) - below


def _below(bound: int, height: int, width: int) -> int:
    """How many pairs of row i and column j have j - i <= bound."""

    def first(rows: int) -> int:  # of a staircase that gains a column with each row, up to the width
        rows = max(0, rows)
        stairs = min(rows, width)
        return stairs * (stairs + 1) // 2 + (rows - stairs) * width

    return first(height + bound) - first(bound)
