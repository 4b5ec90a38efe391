"""Cutting a tile into what kernels can do of its band: whole rectangles, triangles, windows, or strips of rows."""

from __future__ import annotations

from collections.abc import Iterator

from ringcore.values import NOTHING, Band, Capabilities, Tile

Span = tuple[int, int]


def pieces(tile: Tile, can: Capabilities, masked: bool) -> Iterator[Tile]:
    """The visible pairs of ``tile`` as tiles whose bands the kernels take; each pair is in one of them.

    Rows and columns that meet nothing are in none, unless the kernels take any band: those get the tile as it is.
    masked: a mask comes on top, for which some kernels want strips.
    """
    if can.bands == "any":
        yield tile
        return
    if tile.band == Band(None, 0) and tile.height == tile.width > 1 and not masked:  # what most tiles are
        yield tile
        return
    tile = _trimmed(tile)
    if tile.band == NOTHING:
        return
    if can.bands == "windows":
        yield from _windows(tile)
    elif masked or tile.band.lo is not None:
        yield from _strips(tile, can.strip)
    elif tile.band.hi is None:
        yield tile
    else:
        yield from _triangles(tile, tile.band.hi, square=can.bands == "squares")


def _trimmed(tile: Tile) -> Tile:
    """The tile without the first and last rows and columns that meet nothing: then lo <= 0 <= hi."""
    band = tile.band.clipped(tile.height, tile.width)
    if band == NOTHING:
        return tile.part((0, 0), (0, 0), NOTHING)
    rows, columns = band.rows(0, tile.width, tile.height), band.columns(0, tile.height, tile.width)
    band = band.shifted(rows[0], columns[0]).clipped(rows[1] - rows[0], columns[1] - columns[0])
    return tile.part(rows, columns, band)


def _windows(tile: Tile) -> Iterator[Tile]:
    """Windows that kernels can align in the lower right corner: no taller than wide.

    Some take a missing bound for one of all columns, counted from there, and a bound beyond all columns for none.
    """
    if tile.band == Band() or tile.height <= tile.width:
        yield tile
        return
    for rows in ((0, tile.width), (tile.width, tile.height)):
        part = _trimmed(tile.part(rows, (0, tile.width), tile.band.shifted(rows[0], 0)))
        if part.band != NOTHING:
            yield from _windows(part)


def _triangles(tile: Tile, hi: int, square: bool) -> Iterator[Tile]:
    """Causal from the upper left corner, beside and above whole rectangles."""
    height, width = tile.height, tile.width
    if hi > 0:
        yield tile.part((0, height), (0, hi), Band())
    side = width - hi if square else height
    yield tile.part((0, side), (hi, width), Band(None, 0).clipped(side, width - hi))
    if side < height:
        yield tile.part((side, height), (hi, width), Band())


def _strips(tile: Tile, side: int) -> Iterator[Tile]:
    """Blocks of ``side`` rows, each with all the columns that it sees and the band that is left in it."""
    for start in range(0, tile.height, side):
        rows = start, min(tile.height, start + side)
        columns = tile.band.columns(*rows, tile.width)
        if columns[0] < columns[1]:
            band = tile.band.shifted(rows[0], columns[0]).clipped(rows[1] - rows[0], columns[1] - columns[0])
            yield tile.part(rows, columns, band)
