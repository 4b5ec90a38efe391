"""Kernels in CUDA C: compiled once for each device and kind of numbers, launched with a warp for each row."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from ringcore import Array

WARP = 32  # threads that share a row
BLOCK = 256  # threads that start together
MOST_PLACES = 65535  # of a grid's second and third axes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NAMES = {
    np.dtype(np.float16): "__half", BFLOAT16: "__nv_bfloat16", np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
}  # fmt: skip


@cache
def kernel(file: str, name: str, **kinds: Any) -> Any:
    """The kernel of this name in a file of this package; kinds: what its macros stand for, dtypes or numbers."""
    return cupy.RawModule(code=source(file), options=options(**kinds)).get_function(name)


def source(file: str) -> str:
    """The text of a file of kernels, with what they share."""
    return "".join(Path(__file__).with_name(part).read_text() for part in ("rows.cuh", file))


def options(**kinds: Any) -> tuple[str, ...]:
    """What the compiler is told of the kinds."""
    return tuple(f"-D{name}={_NAMES[kind] if isinstance(kind, np.dtype) else kind}" for name, kind in kinds.items())


def rows_grid(batch: int, heads: int, rows: int) -> tuple[int, int, int]:
    """The grid in which each row has a warp."""
    return -(-rows * WARP // BLOCK), heads, batch


def numbers_grid(batch: int, heads: int, rows: int) -> tuple[int, int, int]:
    """The grid in which each number has a thread."""
    return -(-rows // BLOCK), heads, batch


def steps(x: Array) -> tuple[int, ...]:
    """The strides of x, in numbers."""
    size = x.itemsize
    return tuple(stride // size for stride in x.strides)
