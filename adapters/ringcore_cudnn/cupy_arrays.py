"""The kernels for CuPy arrays."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import array_api_compat.cupy
import cupy

from ringcore import Array, UnsupportedError
from ringcore_cudnn.kernels import CudnnFrontend

_LEAST = 8  # compute capability: Ampere
_NOTHING = nullcontext()
_WIDE = 9  # Hopper, where backward too takes heads of 256 columns; elsewhere 128


class CupyArrays:
    """CuPy's arrays, streams and memory pool; see `ringcore_cudnn.Arrays`."""

    xp = array_api_compat.cupy

    def __init__(self) -> None:
        self._one: dict[int, Array] = {}
        self._spread = lru_cache(256)(self._one_for_all)

    def address(self, x: Array) -> int:
        """Where x begins."""
        return int(x.data.ptr)

    def strides(self, x: Array) -> tuple[int, ...]:
        """The strides of x, in elements."""
        return _in_elements(x.strides, x.itemsize)

    def empty(self, shape: tuple[int, ...], like: Array, dtype: Any = None) -> Array:
        """New memory, rows last, on the device of ``like``."""
        with self.on(like):
            return cupy.empty(shape, dtype=dtype or like.dtype)

    def ones(self, like: Array) -> Array:
        """The number 1 for each of ``like``, in float32: one number, kept for each device."""
        device = self.device(like)
        if like.size > 1 and (device in self._one or not self.capturing()):
            return self._spread(device, like.shape)
        with self.on(like):
            if like.size == 1:
                return cupy.ones(like.shape, dtype=cupy.float32)
            return cupy.broadcast_to(cupy.ones((), dtype=cupy.float32), like.shape)  # in the graph's memory

    def _one_for_all(self, device: int, shape: tuple[int, ...]) -> Array:
        with cupy.cuda.Device(device):
            if device not in self._one:
                made = cupy.ones((), dtype=cupy.float32)
                cupy.cuda.get_current_stream().synchronize()  # there before any stream reads it
                self._one[device] = made
            return cupy.broadcast_to(self._one[device], shape)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """x where the condition holds and y elsewhere, in their dtype: of bfloat16 CuPy itself makes float32."""
        with self.on(x):
            x_bits, y_bits = (number.view(cupy.uint16) for number in (x, y))
            return cupy.where(condition, x_bits, y_bits).view(x.dtype)

    def allocate(self, size: int, like: Array) -> tuple[int, Any]:
        """The address of so many bytes on the current device, and what keeps them."""
        room = cupy.cuda.alloc(size)
        return int(room.ptr), room

    def device(self, x: Array) -> int:
        """The number of the device of x."""
        return int(x.data.device_id)

    def stream(self, x: Array) -> int:
        """The address of the current stream on the device of x."""
        return int(cupy.cuda.get_current_stream(x.data.device_id).ptr)

    def on(self, x: Array) -> AbstractContextManager[Any]:
        """A context in which the device of x is the current one."""
        # To enter one takes the host a tenth of a short tile's time; most often it is the current one.
        if x.data.device_id == cupy.cuda.runtime.getDevice():
            return _NOTHING
        context: AbstractContextManager[Any] = x.device
        return context

    def deterministic(self) -> bool:
        """CuPy has no such wish."""
        return False

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        return bool(cupy.cuda.get_current_stream().is_capturing())


@lru_cache(maxsize=1024)
def _in_elements(strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Strides in bytes as strides in elements of so many bytes."""
    return tuple(stride // size for stride in strides)


def load(sharers: int = 1) -> CudnnFrontend:
    """The kernels, where there are GPUs that run them; the host's cores do not matter to them.

    Raises UnsupportedError if there are none, MissingDependency if there is no cuDNN.
    """
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    found = [int(cupy.cuda.Device(n).compute_capability) // 10 for n in range(count)]
    able = [capability for capability in found if capability >= _LEAST]
    if not able:  # an old GPU beside others is found out on probation
        raise UnsupportedError(f"cuDNN's attention needs GPUs of compute capability {_LEAST} or more, not {found}.")
    widest = 256 if all(capability == _WIDE for capability in able) else 128
    return CudnnFrontend(CupyArrays(), "cupy.cuda.cudnn", "cupy", frozenset({"cuda"}), widest)
