"""Products of matrices by cuBLAS: one for each head, summed in the accumulation dtype, never in TF32."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from cupy.cuda import cublas, device, runtime

from ringcore import Array, UnsupportedError
from ringcore_cupy.compiling import BFLOAT16

_TYPES = {
    np.dtype(np.float16): runtime.CUDA_R_16F, BFLOAT16: runtime.CUDA_R_16BF,
    np.dtype(np.float32): runtime.CUDA_R_32F, np.dtype(np.float64): runtime.CUDA_R_64F,
}  # fmt: skip
_LARGEST_STEP = 2**31 - 1


class Matrices(NamedTuple):
    """One matrix for each head: where they begin, what they hold, and how far apart rows and heads are, in numbers."""

    address: int
    dtype: Any
    heads: int
    row: int
    head: int

    def part(self, row: int) -> Matrices:
        """What lies from this row on."""
        return self._replace(address=self.address + row * self.row * self.dtype.itemsize)

    def member(self, number: int, group: int) -> Matrices:
        """Of each group of heads the one with this number."""
        address = self.address + number * self.head * self.dtype.itemsize
        return self._replace(address=address, heads=self.heads // group, head=self.head * group)


class Products:
    """Products on this device's cuBLAS handle, on its current stream."""

    def __init__(self, wide: Any) -> None:
        number = ctypes.c_double if wide == np.float64 else ctypes.c_float
        self._compute = cublas.CUBLAS_COMPUTE_64F if wide == np.float64 else cublas.CUBLAS_COMPUTE_32F
        self._number = number
        self._zero, self._one = number(0.0), number(1.0)
        self._handle = device.get_cublas_handle()

    def put(
        self, first: Matrices, second: Matrices, into: Matrices, rows: int, columns: int, inner: int, *,
        scale: float = 1.0, turned: tuple[bool, bool] = (False, False), add: bool = False,
    ) -> None:  # fmt: skip
        """``into`` [rows, columns] = scale * first [rows, inner] @ second [inner, columns], or that much more.

        turned: whether first and second lie transposed. Where one has fewer heads, each of its heads goes with as many
        neighbours of the others as they have more; what several are added to is summed in their order.
        Raises UnsupportedError while a graph is captured, which CuPy's cuBLAS is not.
        """
        heads = min(first.heads, second.heads, into.heads)
        group = max(first.heads, second.heads, into.heads) // heads
        alpha, beta = self._number(scale), self._one if add else self._zero
        normal, transposed = cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T
        for number in range(group):
            a, b, c = (x if x.heads == heads else x.member(number, group) for x in (first, second, into))
            # cuBLAS counts by columns, in which these matrices are transposed: C^T = B^T A^T.
            try:
                cublas.gemmStridedBatchedEx(
                    self._handle, transposed if turned[1] else normal, transposed if turned[0] else normal,
                    columns, rows, inner, ctypes.addressof(alpha), b.address, _TYPES[b.dtype], b.row, b.head,
                    a.address, _TYPES[a.dtype], a.row, a.head, ctypes.addressof(beta),
                    c.address, _TYPES[c.dtype], c.row, c.head, heads, self._compute, cublas.CUBLAS_GEMM_DEFAULT,
                )  # fmt: skip
            except NotImplementedError as exc:
                raise UnsupportedError(
                    f"CuPy's cuBLAS cannot be captured in a graph ({exc}): take kernels of cuDNN."
                ) from exc


@contextmanager
def products(wide: Any) -> Iterator[Products]:
    """Products with numbers of the accumulation dtype that the host holds."""
    handle = device.get_cublas_handle()
    mode = cublas.getPointerMode(handle)
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    try:
        yield Products(wide)
    finally:
        cublas.setPointerMode(handle, mode)


def matrices(x: Array) -> Matrices:
    """The matrices [S, D] of an array [H, S, D] that is `multipliable`."""
    heads, rows, width = x.shape
    size = x.itemsize
    # Of an axis with one entry the stride is never used, but cuBLAS wants it large enough.
    row = x.strides[1] // size if rows > 1 else max(1, width)
    return Matrices(int(x.data.ptr), x.dtype, heads, row, x.strides[0] // size if heads > 1 else 0)


def multipliable(x: Array) -> bool:
    """Whether cuBLAS takes x [B, H, S, D] as it lies: rows without gaps that do not overlap."""
    _, heads, rows, width = x.shape
    _, head, row, column = (stride // x.itemsize for stride in x.strides)
    dense = (width == 1 or column == 1) and (rows == 1 or width <= row <= _LARGEST_STEP)
    return bool(dense and (heads == 1 or head >= 0))
