"""A stand-in for CuPy on machines without a GPU: NumPy's numbers, in arrays as strict as CuPy's.

Put the folder above into PYTHONPATH before CuPy's. What ringcore uses is here, and no more. Kernels in CUDA C are
compiled for the CPU (`cupy.modules`), streams run everything at once, and memory that CUDA would give is poisoned.
Nothing here knows races between the threads of a kernel, or between streams: those need a GPU.
"""

from __future__ import annotations

import builtins

import numpy as _np

from cupy import cuda
from cupy.arrays import asnumpy, ndarray, wrapped
from cupy.modules import RawKernel, RawModule  # noqa: F401

__version__ = "0+stand-in"

_TAKEN_OVER = [
    "abs",
    "all",
    "any",
    "arange",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctan2",
    "arctanh",
    "argmax",
    "argmin",
    "argsort",
    "around",
    "array_equal",
    "array_split",
    "atleast_1d",
    "broadcast_arrays",
    "broadcast_to",
    "ceil",
    "clip",
    "concatenate",
    "copy",
    "cos",
    "cosh",
    "cumsum",
    "diff",
    "divide",
    "dot",
    "einsum",
    "equal",
    "exp",
    "expand_dims",
    "expm1",
    "eye",
    "flip",
    "floor",
    "full",
    "full_like",
    "greater",
    "greater_equal",
    "invert",
    "isfinite",
    "isinf",
    "isnan",
    "left_shift",
    "less",
    "less_equal",
    "linspace",
    "log",
    "log1p",
    "log2",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "moveaxis",
    "multiply",
    "nan_to_num",
    "negative",
    "nonzero",
    "not_equal",
    "ones",
    "ones_like",
    "outer",
    "permute_dims",
    "power",
    "prod",
    "ravel",
    "remainder",
    "repeat",
    "reshape",
    "right_shift",
    "rint",
    "roll",
    "round",
    "sign",
    "sin",
    "sinh",
    "sort",
    "split",
    "sqrt",
    "squeeze",
    "stack",
    "std",
    "subtract",
    "sum",
    "swapaxes",
    "take",
    "tan",
    "tanh",
    "tensordot",
    "tile",
    "transpose",
    "tril",
    "triu",
    "trunc",
    "unique",
    "var",
    "zeros",
    "zeros_like",
    "add",
    "allclose",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "floor_divide",
    "hypot",
    "copysign",
    "conj",
    "real",
    "imag",
    "meshgrid",
    "searchsorted",
    "count_nonzero",
    "square",
    "reciprocal",
    "signbit",
    "nextafter",
    "logaddexp",
    "vecdot",
    "cross",
    "trace",
    "result_type",
    "can_cast",
]

for _name in _TAKEN_OVER:
    globals()[_name] = wrapped(getattr(_np, _name))

for _name in [
    "bool_",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "dtype",
    "finfo",
    "iinfo",
    "inf",
    "nan",
    "newaxis",
    "pi",
    "e",
    "ufunc",
    "generic",
    "number",
    "floating",
    "integer",
    "intp",
    "issubdtype",
    "promote_types",
]:
    globals()[_name] = getattr(_np, _name)


def where(condition, x, y):
    found = wrapped(_np.where)(condition, x, y)
    return found.astype(_np.float32) if found.dtype.name == "bfloat16" else found  # it has no loop for them


broadcast_shapes = _np.broadcast_shapes


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def empty_like(prototype, dtype=None, **_):
    like = _np.empty_like(prototype.numbers, dtype=dtype)
    order = "F" if like.flags.f_contiguous and not like.flags.c_contiguous else "C"
    return ndarray(like.shape, like.dtype, order=order)


def asarray(a, dtype=None, order=None, *, blocking=False):
    if isinstance(a, ndarray):
        return a if dtype is None or a.dtype == dtype else a.astype(dtype)
    return array(a, dtype=dtype)


def array(obj, dtype=None, copy=True, **_):
    numbers = _np.array(asnumpy(obj) if isinstance(obj, ndarray) else obj, dtype=dtype)
    found = empty(numbers.shape, numbers.dtype)
    found.numbers[...] = numbers
    return found


def ascontiguousarray(a, dtype=None):
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else a.copy()


def get_array_module(*args):
    return __import__("cupy") if builtins.any(isinstance(a, ndarray) for a in args) else _np


def get_default_memory_pool():
    return cuda.pool


def get_default_pinned_memory_pool():
    return cuda.pinned_pool


def from_dlpack(x):
    if isinstance(x, ndarray):
        return x
    raise BufferError("the stand-in takes its own arrays alone")


def shares_memory(a, b):
    return _np.shares_memory(a.numbers, b.numbers)


def may_share_memory(a, b):
    return _np.may_share_memory(a.numbers, b.numbers)


__all__ = [_name for _name in globals() if not _name.startswith("_") and _name not in ("builtins", "annotations")]
