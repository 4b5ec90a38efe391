"""What fused kernels can do of a band: whole rectangles, and triangles from their upper left corner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ringcore import Band


@dataclass(frozen=True)
class Piece:
    """Some rows of a tile against some of its columns.

    Where ``causal``, row i of the piece sees its columns 0 to i; else all of them, but for what ``band``, counted
    within the piece, hides.
    """

    rows: slice
    columns: slice
    causal: bool = False
    band: Band = Band()  # noqa: RUF009  # frozen


def pieces(band: Band, height: int, width: int, side: int) -> Iterator[Piece]:
    """The visible pairs of a tile, each in one piece; rows and columns that meet nothing are in none.

    A lower bound needs a mask, so such tiles are cut into blocks of ``side`` rows with the columns that these see.
    """
    band = band.clipped(height, width)
    if height == 0 or width == 0:
        return
    if band.lo is not None:
        yield from _strips(band, height, width, side)
    elif band.hi is None:
        yield Piece(slice(0, height), slice(0, width))
    elif band.hi < 0:
        yield Piece(slice(-band.hi, height), slice(0, min(width, height + band.hi)), causal=True)
    else:
        if band.hi > 0:
            yield Piece(slice(0, height), slice(0, band.hi))
        yield Piece(slice(0, height), slice(band.hi, min(width, height + band.hi)), causal=True)


def strips(band: Band, height: int, width: int, side: int) -> Iterator[Piece]:
    """The same in blocks of ``side`` rows, each with all the columns that it sees."""
    if height and width:
        yield from _strips(band.clipped(height, width), height, width, side)


def _strips(band: Band, height: int, width: int, side: int) -> Iterator[Piece]:
    first, last = band.rows(0, width, height)
    for start in range(first, last, side):
        rows = start, min(last, start + side)
        columns = band.columns(*rows, width)
        if columns[0] < columns[1]:
            inner = Band() if band.covers(rows, columns) else band.shifted(rows[0], columns[0])
            yield Piece(slice(*rows), slice(*columns), band=inner)
