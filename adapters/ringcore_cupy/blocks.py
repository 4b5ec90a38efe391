"""The blocks in which a tile is computed: their sizes, their bands, and the scratch that one of them takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cupy

from ringcore import Array, Band
from ringcore_cupy.products import Matrices

MOST_KEYS = 1024  # of a block: their scores are in the registers of one warp
_LEAST_KEYS = 64
_MOST_ROWS = 2048
_ALIGNED = 8  # numbers from which on tensor cores load rows of a half type fast
_FAR = 1 << 40  # a bound of a band that hides nothing


class Block(NamedTuple):
    """Rows and keys, as half-open ranges of the tile's, and the bounds of the band counted within the block."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    bounds: tuple[int, int]

    @property
    def height(self) -> int:
        """How many rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """How many keys."""
        return self.keys[1] - self.keys[0]


class Sides(NamedTuple):
    """How many rows and keys the blocks of a tile have; those at its ends have fewer."""

    rows: int
    keys: int

    @classmethod
    def of(cls, heads: int, rows: int, keys: int, room: int, most_keys: int) -> Sides:
        """Those whose scores, over all heads, take ``room`` numbers or little more."""
        wide = min(most_keys, max(1, keys))
        tall = max(1, min(_MOST_ROWS, room // (heads * wide)))
        while tall * 2 < wide and wide > _LEAST_KEYS:  # products want squares
            wide //= 2
            tall *= 2
        return cls(min(tall, max(1, rows)), wide)


def blocks(band: Band, rows: int, keys: int, sides: Sides) -> Iterator[Block]:
    """The blocks of a tile of ``rows`` x ``keys`` in which some pair is visible, the rows' in order of their keys."""
    for row in range(0, rows, sides.rows):
        last_row = min(rows, row + sides.rows)
        first, last = band.columns(row, last_row, keys)
        for key in range(first, last, sides.keys):
            part = band.shifted(row, key)
            bounds = -_FAR if part.lo is None else part.lo, _FAR if part.hi is None else part.hi
            yield Block((row, last_row), (key, min(last, key + sides.keys)), bounds)


class Scratch:
    """Memory for the scores of one block and for weights of the inputs' dtype, which are one where the dtypes are."""

    def __init__(self, heads: int, sides: Sides, wide: Any, narrow: Any) -> None:
        step = _aligned(sides.keys)
        self._steps = heads, step, sides.rows * step
        shape = heads, sides.rows, step
        self._kept: list[Array] = [cupy.empty(shape, dtype=wide)]
        if narrow != wide:
            self._kept.append(cupy.empty(shape, dtype=narrow))

    @property
    def scores(self) -> Matrices:
        """In the accumulation dtype."""
        return self._matrices(self._kept[0])

    @property
    def weights(self) -> Matrices:
        """In the dtype of the inputs: a kernel that has read the scores may write them in their place."""
        return self._matrices(self._kept[-1])

    @staticmethod
    def bytes(heads: int, sides: Sides, wide: Any, narrow: Any) -> int:
        """How many it takes."""
        each = wide.itemsize + (narrow.itemsize if narrow != wide else 0)
        return int(heads * sides.rows * _aligned(sides.keys) * each)

    def _matrices(self, x: Array) -> Matrices:
        return Matrices(int(x.data.ptr), x.dtype, *self._steps)


def _aligned(keys: int) -> int:
    """How far apart rows of so many keys lie."""
    return -(-keys // _ALIGNED) * _ALIGNED
