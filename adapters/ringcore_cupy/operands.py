"""The arrays of a tile as its kernels take them: rows without gaps, NaN and infinities away where they are hidden."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ringcore import Array
from ringcore_cupy.blocks import MOST_KEYS
from ringcore_cupy.compiling import BLOCK, MOST_PLACES, kernel, rows_grid, steps
from ringcore_cupy.products import Matrices, matrices, multipliable


class Operand:
    """An array [B, H, S, D] that is read."""

    def __init__(self, x: Array) -> None:
        self._x = x if multipliable(x) else cupy.ascontiguousarray(x)

    def of(self, entry: int) -> Matrices:
        """Those of a batch entry."""
        return matrices(self._x[entry])


class Clean(Operand):
    """A copy of an array that is read, with 0 for NaN and infinities, and a byte for each row that had some."""

    def __init__(self, x: Array) -> None:
        batch, heads, rows, width = x.shape
        found = cupy.empty(x.shape, dtype=x.dtype)
        self._poisoned = cupy.empty(x.shape[:3], dtype=np.uint8)
        if found.size:
            wide = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
            run = kernel("tiled.cu", "clean", WIDE=wide, NUMBER=x.dtype, BIAS=wide, SOFT=0, MOST_KEYS=MOST_KEYS)
            for start in range(0, batch, MOST_PLACES):
                part = slice(start, start + MOST_PLACES)
                places = x[part], found[part], self._poisoned[part]
                run(rows_grid(len(places[0]), heads, rows), (BLOCK,), (*places, rows, width, *steps(x)))
        super().__init__(found)

    def poisoned(self, entry: int, row: int) -> tuple[int, int]:
        """The address of the bytes of a batch entry from a row on, and how far apart heads are."""
        _, heads, rows = self._poisoned.shape
        return int(self._poisoned.data.ptr) + entry * heads * rows + row, rows


class Sums(Operand):
    """An array [B, H, S, D] that is added to: itself, or a copy that is written back, if its rows have gaps."""

    def __init__(self, x: Array) -> None:
        super().__init__(x if x.shape[1] == 1 or x.strides[1] else cupy.ascontiguousarray(x))
        self._target = x

    def close(self) -> None:
        """No more is added."""
        if self._x is not self._target:
            self._target[...] = self._x


class Statistic:
    """One number for each row [B, H, S]."""

    def __init__(self, x: Array) -> None:
        self._batch, *self.steps = steps(x)
        self._x, self._address, self._size = x, int(x.data.ptr), x.itemsize

    def of(self, entry: int, row: int) -> int:
        """The address of that of a batch entry's first head and this row."""
        return int(self._address + (entry * self._batch + row * self.steps[1]) * self._size)


def accumulation(x: Any) -> Any:
    """The NumPy dtype in which sums over x are kept."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
