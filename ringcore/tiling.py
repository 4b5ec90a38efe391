"""Tiles: the visible part of the score matrix between two shards, as rectangles under bands.

Everything here is plain Python over shapes and keywords; no array is touched.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import lcm
from typing import Any

from ringcore.arrays import slice_of
from ringcore.dilation import Dilation, common, head_slices, kept
from ringcore.documents import Runs
from ringcore.values import NOTHING, Band, Tile


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees, apart from a bias or mask array, and for which heads and batch entries.

    window: how far left and right of itself a query sees, in positions; None is unbounded.
    offsets: for each batch entry the position of q's first row. key_limits: for each batch entry how many
    keys exist. joined: whether tiles may be joined across ranges of positions. documents: for each batch entry which
    stretches of positions are of which document; None is one document. dilation: of those pairs only what its branches
    show, as often as they do; None is all, once.
    """

    causal: bool
    window: tuple[int | None, int | None]
    offsets: tuple[int, ...]
    key_limits: tuple[int, ...]
    heads: int
    key_heads: int
    joined: bool = True
    documents: tuple[Runs, ...] | None = None
    dilation: Dilation | None = None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """The smallest and the largest visible ``key position - query position``; None is unbounded."""
        left, right = self.window
        if self.causal:
            right = 0 if right is None else min(right, 0)
        return None if left is None else -left, right

    @property
    def near(self) -> bool:
        """Whether queries see no keys from some distance on, or none of other documents or segments."""
        return self.window[0] is not None or self.documents is not None or self.dilation is not None


@dataclass(frozen=True)
class Piece:
    """Rows of a shard: their places in it, and the global positions that they hold."""

    local: slice
    positions: range

    def part(self, start: int, stop: int) -> Piece:
        """Some of its rows, a half-open range counted within it, where those of a shard lie side by side."""
        return Piece(slice(self.local.start + start, self.local.start + stop, 1), self.positions[start:stop])

    def residues(self, step: int) -> list[Piece]:
        """The piece cut into pieces whose positions are ``step`` apart."""
        if len(self.positions) == 1:
            return [self]
        count = step // self.positions.step
        places = range(self.local.start, self.local.stop, self.local.step)
        cut = (Piece(slice_of(places[i::count]), self.positions[i::count]) for i in range(count))
        return [piece for piece in cut if piece.positions]

    def common(self, chosen: range) -> Piece:
        """Those of its rows whose positions are among the chosen ones."""
        both = common(self.positions, chosen)
        if not both:
            return Piece(slice(0, 0, 1), both)
        places = range(self.local.start, self.local.stop, self.local.step)
        first, last = (self.positions.index(both[place]) for place in (0, -1))
        return Piece(slice_of(places[first : last + 1 : both.step // self.positions.step]), both)


def tiles_between(rows: Iterable[range], columns: Iterable[range], visibility: Visibility) -> tuple[Tile, ...]:
    """The tiles in which queries at positions ``rows`` see keys at positions ``columns``.

    Batch entries of equal offset, key limit and documents share their tiles. Neighbouring tiles are joined where one
    band says what theirs say.
    """
    rows, columns = tuple(rows), tuple(columns)
    found: list[Tile] = []
    first = 0
    documents = visibility.documents or (None,) * len(visibility.offsets)
    entries = zip(visibility.offsets, visibility.key_limits, documents, strict=True)
    for (offset, limit, runs), group in groupby(entries):
        batch = slice(first, first := first + len(list(group)))
        row_pieces = pieces(range(piece.start + offset, piece.stop + offset, piece.step) for piece in rows)
        column_pieces = [_below(piece, limit) for piece in pieces(columns)]
        for some_rows, some_columns in _of_one_document(row_pieces, column_pieces, runs):
            if visibility.dilation is None:
                found += _tiles_of_pieces(visibility, batch, some_rows, some_columns)
            else:
                found += _dilated(visibility.dilation, visibility, batch, some_rows, some_columns)
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


def _tiles_of_pieces(
    visibility: Visibility, batch: slice, rows: Sequence[Piece], columns: Sequence[Piece]
) -> list[Tile]:
    grid = [[_cell(visibility, batch, row, column) for column in columns] for row in rows]
    together = visibility.joined and all(piece.local.step == 1 for piece in (*rows, *columns))
    if together and all(len(cell) == 1 for line in grid for cell in line):
        lines = [_joined([cell[0] for cell in line], _join_columns) for line in grid]
        return _joined([tile for line in lines for tile in line if tile.band != NOTHING], _join_rows)
    return [tile for line in grid for cell in line for tile in cell]


def _dilated(
    dilation: Dilation, visibility: Visibility, batch: slice, rows: Sequence[Piece], columns: Sequence[Piece]
) -> Iterator[Tile]:
    """The tiles of each branch and segment, for the heads of each offset."""
    group = visibility.heads // visibility.key_heads
    of_rows, of_columns = ([piece.positions for piece in side] for side in (rows, columns))
    for chosen, heads in kept(dilation, of_rows, of_columns, visibility.heads):
        some_rows, some_columns = (
            [part for part in (piece.common(chosen) for piece in side) if part.positions] for side in (rows, columns)
        )
        if some_rows and some_columns:
            for tile in _tiles_of_pieces(visibility, batch, some_rows, some_columns):
                for q_heads, k_heads in head_slices(heads, group):
                    yield replace(tile, q_heads=q_heads, k_heads=k_heads)


def _of_one_document(
    rows: list[Piece], columns: list[Piece], runs: Runs | None
) -> Iterator[tuple[list[Piece], list[Piece]]]:
    """The rows and columns of each document that has both."""
    if runs is None:
        yield rows, columns
        return
    of_rows, of_columns = _by_document(rows, runs), _by_document(columns, runs)
    yield from ((of_rows[document], of_columns[document]) for document in of_rows if document in of_columns)


def _by_document(shard: Iterable[Piece], runs: Runs) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    ends = [stop for _, stop, _ in runs]
    for piece in shard:
        done = 0
        while done < len(piece.positions):
            _, stop, document = runs[bisect_right(ends, piece.positions[done])]
            count = bisect_left(piece.positions, stop)
            found.setdefault(document, []).append(piece.part(done, count))
            done = count
    return found


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
    return piece.part(0, count)


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
