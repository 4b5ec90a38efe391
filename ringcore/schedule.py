"""Plans: which tiles a rank computes, in which order, and which blocks move meanwhile.

Everything here is plain Python over shapes and keywords; no array is touched.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import groupby, product
from math import lcm
from typing import Any

from ringcore.arrays import slice_of
from ringcore.layout import Layout
from ringcore.values import NOTHING, Band, Move, Plan, Step, Tile, span


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees, apart from a bias or mask array, and for which heads and batch entries.

    window: how far left and right of itself a query sees, in positions; None is unbounded.
    offsets: for each batch entry the position of q's first row. key_limits: for each batch entry how many
    keys exist. joined: whether tiles may be joined across ranges of positions.
    """

    causal: bool
    window: tuple[int | None, int | None]
    offsets: tuple[int, ...]
    key_limits: tuple[int, ...]
    heads: int
    key_heads: int
    joined: bool = True

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """The smallest and the largest visible ``key position - query position``; None is unbounded."""
        left, right = self.window
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return None if left is None else -left, right


@dataclass(frozen=True)
class Piece:
    """Rows of a shard: their places in it, and the global positions that they hold."""

    local: slice
    positions: range

    def residues(self, step: int) -> list[Piece]:
        """The piece cut into pieces whose positions are ``step`` apart."""
        if len(self.positions) == 1:
            return [self]
        count = step // self.positions.step
        places = range(self.local.start, self.local.stop)
        cut = (Piece(slice_of(places[i::count]), self.positions[i::count]) for i in range(count))
        return [piece for piece in cut if piece.positions]


@lru_cache(maxsize=256)
def ring_plans(q_layout: Layout, k_layout: Layout, visibility: Visibility) -> tuple[Plan, ...]:
    """Every rank's plan where k and v pass around the ring and q stays.

    A block travels only as far as some rank sees a part of it.
    """

    @cache
    def tiles(resident: int, visitor: int) -> tuple[Tile, ...]:
        return tiles_between(q_layout.shards[resident], k_layout.shards[visitor], visibility)

    def rows(visitor: int) -> range | None:
        guests = (resident for resident in range(q_layout.size) if resident != visitor)
        seen = span(tile for guest in guests for tile in tiles(guest, visitor))
        return None if len(seen) in (0, k_layout.lengths[visitor]) else seen

    return rotation(q_layout.size, tiles, [rows(visitor) for visitor in range(q_layout.size)])


def rotation(
    size: int, tiles: Callable[[int, int], tuple[Tile, ...]], rows: Sequence[range | None] | None = None
) -> tuple[Plan, ...]:
    """Every rank's plan in a ring where each rank's block visits the next ranks, one after the other.

    ``tiles(resident, visitor)`` are the tiles of ``visitor``'s block at rank ``resident``. The accumulators of a
    block follow it from its first guest on, and return to its owner from the last: those of its ``rows`` that guests
    see, None is all.
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
                drops=(block,),
            )
        )
    home = (Move((rank + hops[rank]) % size, rank, rows[rank]),) if hops[rank] else ()
    return Plan(rank, size, tuple(steps), home)


def tiles_between(rows: Iterable[range], columns: Iterable[range], visibility: Visibility) -> tuple[Tile, ...]:
    """The tiles in which queries at positions ``rows`` see keys at positions ``columns``.

    Batch entries of equal offset and key limit share their tiles. Neighbouring tiles are joined where one
    band says what theirs say.
    """
    rows, columns = tuple(rows), tuple(columns)
    found: list[Tile] = []
    first = 0
    for (offset, limit), group in groupby(zip(visibility.offsets, visibility.key_limits, strict=True)):
        batch = slice(first, first := first + len(list(group)))
        row_pieces = pieces(range(piece.start + offset, piece.stop + offset, piece.step) for piece in rows)
        column_pieces = [_below(piece, limit) for piece in pieces(columns)]
        grid = [[_cell(visibility, batch, row, column) for column in column_pieces] for row in row_pieces]
        if visibility.joined and all(len(cell) == 1 for line in grid for cell in line):
            lines = [_joined([cell[0] for cell in line], _join_columns) for line in grid]
            found += _joined([tile for line in lines for tile in line if tile.band != NOTHING], _join_rows)
        else:
            found += [tile for line in grid for cell in line for tile in cell]
    return tuple(tile for tile in found if tile.band != NOTHING)


def pieces(shard: Iterable[range]) -> list[Piece]:
    """The ranges of a shard with their places in it."""
    found: list[Piece] = []
    start = 0
    for positions in shard:
        found.append(Piece(slice(start, start := start + len(positions), 1), positions))
    return found


def visible_band(rows: range, columns: range, reach: tuple[int | None, int | None]) -> Band:
    """Which pairs of two ranges of equal step are visible, counted by index.

    ``reach`` bounds the column's position minus the row's; None is unbounded.
    """
    gap, step = rows.start - columns.start, (rows if len(rows) > 1 else columns).step
    lo, hi = reach
    return Band(
        None if lo is None else -((-lo - gap) // step),
        None if hi is None else (hi + gap) // step,
    ).clipped(len(rows), len(columns))


def _cell(visibility: Visibility, batch: slice, row: Piece, column: Piece) -> list[Tile]:
    """The tiles of one range of rows and one of columns: one, or one for each pair of residues."""

    def tile(row: Piece, column: Piece, band: Band) -> Tile:
        heads = slice(0, visibility.heads), slice(0, visibility.key_heads)
        return Tile(batch, *heads, row.local, column.local, (row.positions,), (column.positions,), band)

    rows, columns, (lo, hi) = row.positions, column.positions, visibility.reach
    if not rows or not columns:
        return [tile(row, column, NOTHING)]
    # Ranges that see each other wholly or not at all are known by their nearest and farthest pair, whatever the steps.
    nearest, farthest = columns[0] - rows[-1], columns[-1] - rows[0]
    if (lo is None or nearest >= lo) and (hi is None or farthest <= hi):
        return [tile(row, column, Band())]
    if (lo is not None and farthest < lo) or (hi is not None and nearest > hi):
        return [tile(row, column, NOTHING)]
    step = lcm(*(positions.step for positions in (rows, columns) if len(positions) > 1))
    cut = product(row.residues(step), column.residues(step))
    return [tile(r, c, visible_band(r.positions, c.positions, visibility.reach)) for r, c in cut]


def _below(piece: Piece, limit: int) -> Piece:
    """The part of a piece whose positions are smaller than ``limit``."""
    count = bisect_left(piece.positions, limit)
    return Piece(slice(piece.local.start, piece.local.start + count, 1), piece.positions[:count])


def _joined(tiles: Sequence[Tile], join: Callable[[Tile, Tile], Tile | None]) -> list[Tile]:
    found: list[Tile] = []
    for tile in tiles:
        for index, earlier in enumerate(found):
            both = join(earlier, tile)
            if both:
                found[index] = both
                break
        else:
            found.append(tile)
    return found


def _join_columns(left: Tile, right: Tile) -> Tile | None:
    """One tile for two side by side, or None if no band says what theirs say."""
    if left.rows != right.rows or left.columns.stop != right.columns.start:
        return None
    return _join(
        left,
        right,
        (0, left.width),
        columns=slice(left.columns.start, right.columns.stop, 1),
        column_positions=left.column_positions + right.column_positions,
    )


def _join_rows(upper: Tile, lower: Tile) -> Tile | None:
    """One tile for two above each other, or None if no band says what theirs say."""
    if upper.columns != lower.columns or upper.rows.stop != lower.rows.start:
        return None
    return _join(
        upper,
        lower,
        (upper.height, 0),
        rows=slice(upper.rows.start, lower.rows.stop, 1),
        row_positions=upper.row_positions + lower.row_positions,
    )


def _join(first: Tile, second: Tile, origin: tuple[int, int], **extent: Any) -> Tile | None:
    """``first`` grown to ``extent``; ``second`` begins at ``origin`` = (row, column) of it."""
    back = second.band.shifted(-origin[0], -origin[1])
    # What hides a whole tile is told by its neighbour's band, never by NOTHING's own bounds.
    telling = [band for tile, band in ((first, first.band), (second, back)) if tile.band != NOTHING] or [NOTHING]
    bounds = product({band.lo for band in telling}, {band.hi for band in telling})
    for band in (Band(*pair) for pair in bounds):
        fits_first = band.clipped(first.height, first.width) == first.band
        if fits_first and band.shifted(*origin).clipped(second.height, second.width) == second.band:
            return replace(first, band=band, **extent)
    return None
