"""Tiles that kernels compute in one launch: each with rows and keys of its own, under one band."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ringcore.pieces import pieces
from ringcore.values import Band, Capabilities, Tile

_KEPT = 4096  # steps whose launches are remembered: plans are, and to group thousands of tiles takes milliseconds
_remembered: dict[tuple[int, str, int], tuple[Sequence[Tile], list[Tile]]] = {}


def launches(tiles: Sequence[Tile], can: Capabilities) -> list[Tile]:
    """The tiles of a step as kernels without bias and mask take them: cut to their bands, then `grouped`."""
    key = id(tiles), can.bands, can.strip
    found = _remembered.get(key)
    if found is None:
        if len(_remembered) >= _KEPT:
            del _remembered[next(iter(_remembered))]
        cut = (piece for tile in tiles for piece in pieces(tile, can, masked=False))
        found = _remembered[key] = tiles, grouped(cut)  # with the tiles, so that no others get their id
    return found[1]


def grouped(tiles: Iterable[Tile]) -> list[Tile]:
    """The tiles, in the order of their rows; those that one launch can hold became one tile with ``parts``."""
    groups: list[tuple[Band, list[Tile]]] = []
    for tile in sorted(tiles, key=lambda tile: (tile.batch.start or 0, tile.rows.start, tile.columns.start)):
        for place, (corner, group) in enumerate(groups):
            common = _common(corner, group, tile) if _follows(group[-1], tile) else None
            if common is not None:
                group.append(tile)
                groups[place] = common, group
                break
        else:
            groups.append((_from_corner(tile), [tile]))
    return [group[0] if len(group) == 1 else _one(corner, group) for corner, group in groups]


def _from_corner(tile: Tile) -> Band:
    """The tile's band, counted from its lower right corner."""
    return tile.band.shifted(tile.height, tile.width)


def _says(corner: Band, tile: Tile) -> bool:
    """Whether a band that is counted from the lower right corner says of a tile what its own does."""
    return corner.shifted(-tile.height, -tile.width).clipped(tile.height, tile.width) == tile.band


def _common(corner: Band, group: list[Tile], tile: Tile) -> Band | None:
    """The band that says what those of the group and of the tile say."""
    if _says(corner, tile):
        return corner
    other = _from_corner(tile)
    return other if all(_says(other, part) for part in group) else None


def _follows(earlier: Tile, tile: Tile) -> bool:
    """Whether one slice of rows, and one of columns, holds both tiles, one after the other."""
    heads = earlier.batch, earlier.q_heads, earlier.k_heads
    sides = (earlier.rows, tile.rows), (earlier.columns, tile.columns)
    return heads == (tile.batch, tile.q_heads, tile.k_heads) and all(
        before.stop <= after.start and before.step == after.step and (after.start - before.start) % after.step == 0
        for before, after in sides
    )


def _one(corner: Band, parts: list[Tile]) -> Tile:
    first, last = parts[0], parts[-1]
    return replace(
        first,
        rows=slice(first.rows.start, last.rows.stop, first.rows.step),
        columns=slice(first.columns.start, last.columns.stop, first.columns.step),
        row_positions=tuple(places for part in parts for places in part.row_positions),
        column_positions=tuple(places for part in parts for places in part.column_positions),
        band=corner,
        parts=tuple(parts),
    )
