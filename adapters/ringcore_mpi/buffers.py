"""The bytes of arrays: of any dtype, in place, without importing the array's library."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np
from mpi4py import MPI

from ringcore import Spec, UnsupportedError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def check_array(x: Any, device_buffers: bool = False) -> None:
    """Refuse, by name, an array whose memory cannot be reached from here.

    Raises UnsupportedError for anything but NumPy arrays and Torch tensors in host memory, and where MPI takes a GPU's
    memory CuPy arrays.
    """
    if array_api_compat.is_cupy_array(x):
        if device_buffers:
            return
        raise UnsupportedError(
            "an array of CuPy is in a GPU's memory, which this MPI library does not say that it takes: given it all "
            "the same it would end the process. Over ringcore_cupy.CupyTransport(comm) such arrays take other ways."
        )
    if array_api_compat.is_numpy_array(x) and not x.dtype.hasobject:
        return
    if array_api_compat.is_torch_array(x):
        if x.device.type == "cpu":
            return
        raise UnsupportedError(
            f"a tensor is on {x.device}; the MPI transport carries host memory. Move it there first (x.cpu()), or "
            "use a ring for that device."
        )
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    raise UnsupportedError(
        f"an array is a {kind}; the MPI transport carries NumPy arrays and Torch tensors in host memory, which it can "
        "write in place. Convert q, k and v with numpy.asarray first."
    )


def contiguous(x: Any) -> Any:
    """x itself if its elements lie in order without gaps, else a copy in which they do."""
    if array_api_compat.is_torch_array(x):
        return x.detach().contiguous()
    if array_api_compat.is_cupy_array(x):
        return x if x.flags.c_contiguous else x.copy(order="C")
    return np.ascontiguousarray(x)


def bytes_of(x: Any) -> Bytes:
    """The memory of a contiguous array, as bytes. Keep x alive while they are used."""
    if array_api_compat.is_torch_array(x):
        # The address works for every dtype and release of Torch; DLPack knows neither bfloat16 in NumPy nor, in
        # older releases, memory that may be written.
        return as_bytes(MPI.buffer.fromaddress(x.data_ptr(), x.nbytes))
    if array_api_compat.is_cupy_array(x):
        # For MPI alone, which looks where an address is: nothing on the host may touch these bytes.
        return as_bytes(MPI.buffer.fromaddress(x.data.ptr, x.nbytes))
    flat: Bytes = x.reshape(-1).view(np.uint8)
    return flat


def as_bytes(buffer: Any) -> Bytes:
    """The memory behind any object with the buffer protocol, as an array that keeps the object alive."""
    return np.frombuffer(buffer, dtype=np.uint8) if len(buffer) else np.empty(0, dtype=np.uint8)


def size_of(spec: Spec) -> int:
    """How many bytes an array of this spec has."""
    return math.prod(spec.shape) * int(spec.dtype.itemsize)


def array_at(memory: Bytes, spec: Spec, *, writable: bool) -> Any:
    """The array of this spec that lies in ``memory``, which has exactly its size.

    Torch has no read-only tensors, so ``writable`` is heard by NumPy alone.
    """
    if array_api_compat.is_torch_array(spec.like):
        if memory.size == 0:
            return spec.empty()
        xp = array_api_compat.array_namespace(spec.like)
        return xp.from_dlpack(memory).view(spec.dtype).reshape(spec.shape)
    x = memory.view(spec.dtype).reshape(spec.shape)
    x.flags.writeable = writable
    return x


def address_of(x: Any) -> int:
    """Where the first element of x lies."""
    address: int = x.data_ptr() if array_api_compat.is_torch_array(x) else x.ctypes.data
    return address
