"""Arrays that hold NumPy's, and refuse what CuPy's refuse: NumPy's arrays beside them, and to become one unasked."""

from __future__ import annotations

import operator
from functools import wraps

import numpy as np

from cupy import cuda

_ALIGNED = 512  # bytes, as CUDA's memory is


class ndarray:  # noqa: N801
    """An array on the device that was current when its memory was made."""

    __array_priority__ = 100
    __array_ufunc__ = None  # NumPy's arrays leave operators to this class
    __hash__ = None

    def __init__(self, shape=(), dtype=float, memptr=None, strides=None, order="C"):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memptr = cuda.alloc(size) if memptr is None else memptr
        room = memptr.bytes()
        if strides is None:
            flat = room[:size].view(dtype)
            self.numbers = flat.reshape(shape, order=order)
        else:
            self.numbers = np.ndarray(shape, dtype, buffer=room, strides=strides)
        self.device = memptr.device

    @property
    def data(self):
        return cuda.MemoryPointer.at(self.numbers, self.device)

    @property
    def base(self):
        return self.numbers.base

    def get(self, stream=None, order="C", out=None, blocking=True):
        if out is None:
            return np.array(self.numbers, order=order)
        out[...] = self.numbers
        return out

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        self.numbers[...] = arr

    def item(self):
        return self.numbers.item()

    def astype(self, dtype, copy=True, **_):
        if not copy and self.dtype == dtype:
            return self
        return of_numpy(self.numbers.astype(dtype), self.device)

    def view(self, dtype=None):
        return self if dtype is None else _part(self.numbers.view(dtype), self.device)

    def fill(self, value):
        self.numbers.fill(_taken(value))

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    @property
    def __cuda_array_interface__(self):
        return {**self.numbers.__array_interface__, "version": 3, "stream": 1}

    def __getitem__(self, index):
        index = tuple(map(_taken, index)) if isinstance(index, tuple) else _taken(index)
        return _part(np.asarray(self.numbers[index]) if self._single(index) else self.numbers[index], self.device)

    def _single(self, index):
        return not isinstance(self.numbers[index], np.ndarray)

    def __setitem__(self, index, value):
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        index = tuple(map(_taken, index)) if isinstance(index, tuple) else _taken(index)
        self.numbers[index] = _taken(value)

    def __len__(self):
        return len(self.numbers)

    def __iter__(self):
        return (self[n] for n in range(len(self)))

    def __bool__(self):
        return bool(self.numbers)

    def __int__(self):
        return int(self.numbers)

    def __index__(self):
        return operator.index(self.numbers)

    def __float__(self):
        return float(self.numbers)

    def __repr__(self):
        return repr(self.numbers)

    def __dlpack__(self, **_):
        raise BufferError("the stand-in's memory is no device's")

    def __dlpack_device__(self):
        return 2, self.device.id


def of_numpy(x, device=None):
    """A new array of x's numbers, unless x lies in an array's memory already."""
    if not isinstance(x, np.ndarray | np.generic):
        return x
    x = np.asarray(x)
    with device or cuda.Device():
        found = ndarray(x.shape, x.dtype, order="F" if x.flags.f_contiguous and not x.flags.c_contiguous else "C")
    found.numbers[...] = x
    return found


def asnumpy(x, *_, **__):
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def wrapped(function):
    """A function of NumPy's, of arrays of ours."""

    @wraps(function)
    def ours(*args, **kwargs):
        taken = [_deep(x) for x in args]
        named = {name: _deep(x) for name, x in kwargs.items()}
        devices = {x.device.id: x.device for x in (*args, *kwargs.values()) if isinstance(x, ndarray)}
        if len(devices) > 1:
            raise ValueError("Array device must be same as the current device")
        with np.errstate(all="ignore"):
            found = function(*taken, **named)
        if isinstance(kwargs.get("out"), ndarray):
            return kwargs["out"]
        return _given(found, [x for x in taken if isinstance(x, np.ndarray)], next(iter(devices.values()), None))

    return ours


def _given(found, inputs, device):
    if isinstance(found, tuple | list):
        return (
            type(found)(_given(x, inputs, device) for x in found)
            if type(found) in (tuple, list)
            else tuple(_given(x, inputs, device) for x in found)
        )
    if isinstance(found, np.ndarray) and any(np.may_share_memory(found, x) for x in inputs):
        return _part(found, device)
    return of_numpy(found, device) if isinstance(found, np.ndarray | np.generic) else found


def _part(numbers, device):
    found = ndarray.__new__(ndarray)
    if not isinstance(numbers, np.ndarray):
        numbers = np.asarray(numbers)
    found.numbers, found.device = numbers, device or cuda.Device()
    return found


def _taken(x):
    """What NumPy gets for x; NumPy's own arrays are refused, as CuPy does."""
    if isinstance(x, ndarray):
        return x.numbers
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return x


def _deep(x):
    return type(x)(_deep(y) for y in x) if type(x) in (tuple, list) else _taken(x)


def _method(name):
    def method(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            found = getattr(self.numbers, name)(*map(_taken, args), **{key: _taken(x) for key, x in kwargs.items()})
        return found if found is NotImplemented else _given(found, [self.numbers], self.device)

    return method


def _operator(name):
    def method(self, other):
        if isinstance(other, np.ndarray) and other.ndim:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return _method(name)(self, other)

    return method


def _in_place(name):
    def method(self, other):
        with np.errstate(all="ignore"):
            getattr(self.numbers, name)(_taken(other))
        return self

    return method


for _name in [
    "sum",
    "max",
    "min",
    "any",
    "all",
    "mean",
    "prod",
    "copy",
    "reshape",
    "transpose",
    "swapaxes",
    "squeeze",
    "ravel",
    "repeat",
    "argmax",
    "cumsum",
]:
    setattr(ndarray, _name, _method(_name))
for _name in ["neg", "pos", "abs", "invert"]:
    setattr(ndarray, f"__{_name}__", _method(f"__{_name}__"))
for _name in [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]:
    for _side in ("", "r"):
        setattr(ndarray, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
    setattr(ndarray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ["lt", "le", "gt", "ge", "eq", "ne"]:
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ["shape", "dtype", "ndim", "size", "itemsize", "nbytes", "strides", "flags"]:
    setattr(ndarray, _name, property(lambda self, name=_name: getattr(self.numbers, name)))
ndarray.T = property(lambda self: self.transpose())
ndarray.__hash__ = None
