"""cuBLAS: products of matrices that lie anywhere, by columns as it has them."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from cupy.cuda.runtime import CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F, CUDA_R_64F

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 68, 70
CUBLAS_GEMM_DEFAULT = -1
CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1

_TYPES = {CUDA_R_32F: np.float32, CUDA_R_64F: np.float64, CUDA_R_16F: np.float16, CUDA_R_16BF: ml_dtypes.bfloat16}

_COMBINATIONS = {
    (CUBLAS_COMPUTE_64F, CUDA_R_64F, CUDA_R_64F),
    (CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_32F),
    *((CUBLAS_COMPUTE_32F, half, c) for half in (CUDA_R_16F, CUDA_R_16BF) for c in (half, CUDA_R_32F)),
}


def setStream(handle, stream):  # noqa: N802
    pass


_modes = {}


def getPointerMode(handle):  # noqa: N802
    return _modes.get(handle, CUBLAS_POINTER_MODE_HOST)


def setPointerMode(handle, mode):  # noqa: N802
    _modes[handle] = mode


def gemmStridedBatchedEx(  # noqa: N802
    handle, transa, transb, m, n, k, alpha, a, a_type, lda, stride_a, b, b_type, ldb, stride_b, beta, c, c_type, ldc,
    stride_c, batch, compute_type, algo,
):  # fmt: skip
    if getPointerMode(handle) != CUBLAS_POINTER_MODE_HOST:
        raise ValueError("the numbers lie on the host, but the handle reads them on the device")
    if not (a_type == b_type and (compute_type, a_type, c_type) in _COMBINATIONS):
        raise ValueError(f"CUBLAS_STATUS_NOT_SUPPORTED: {compute_type}, {a_type}, {b_type}, {c_type}")
    if not all(-(1 << 31) <= n < 1 << 31 for n in (m, n, k, lda, ldb, ldc, batch)):
        raise OverflowError("value too large to convert to int")
    if batch > 1 and stride_c < m:
        raise ValueError(f"the results of a batch overlap: {stride_c} numbers apart")
    wide = ctypes.c_double if compute_type == CUBLAS_COMPUTE_64F else ctypes.c_float
    alpha, beta = (wide.from_address(int(x)).value for x in (alpha, beta))
    rows = (m, k) if transa == CUBLAS_OP_N else (k, m)
    first = _matrices(a, a_type, *rows, lda, stride_a, batch)
    rows = (k, n) if transb == CUBLAS_OP_N else (n, k)
    second = _matrices(b, b_type, *rows, ldb, stride_b, batch)
    result = _matrices(c, c_type, m, n, ldc, stride_c, batch)
    if 0 in (m, n, batch):
        return
    kept = np.dtype(wide)
    first = first if transa == CUBLAS_OP_N else first.swapaxes(1, 2)
    second = second if transb == CUBLAS_OP_N else second.swapaxes(1, 2)
    with np.errstate(all="ignore"):
        product = kept.type(alpha) * (first.astype(kept) @ second.astype(kept))
        if beta:
            product += kept.type(beta) * result.astype(kept)
        result[...] = product.astype(result.dtype)


def _matrices(address, kind, rows, columns, leading, stride, batch):
    dtype = np.dtype(_TYPES[kind])
    size = dtype.itemsize
    extent = ((batch - 1) * abs(stride) + max(0, columns - 1) * leading + rows) * size if batch and columns else 0
    if extent <= 0 or rows == 0:
        return np.zeros((batch, rows, columns), dtype)
    if leading < rows:
        raise ValueError(f"leading dimension {leading} below {rows}")
    memory = (ctypes.c_uint8 * extent).from_address(int(address))
    return np.ndarray((batch, rows, columns), dtype, memory, strides=(stride * size, size, leading * size))
