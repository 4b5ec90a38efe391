"""The kernels for CuPy arrays."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
        self._ones: dict[int, Array] = {}

    def address(self, x: Array) -> int:
        """Where x begins."""
        return int(x.data.ptr)

    def strides(self, x: Array) -> tuple[int, ...]:
        """The strides of x, in elements."""
        return tuple(stride // x.itemsize for stride in x.strides)

    def empty(self, shape: tuple[int, ...], like: Array, dtype: Any = None) -> Array:
        """New memory, rows last, on the device of ``like``."""
        with self.on(like):
            return cupy.empty(shape, dtype=dtype or like.dtype)

    def one(self, like: Array) -> Array:
        """The number 1 in float32, kept for each device; in a graph it is made anew, in the graph's memory."""
        device = self.device(like)
        with like.device:
            stream = cupy.cuda.get_current_stream()
            if stream.is_capturing():
                return cupy.ones((), dtype=cupy.float32)
            if device not in self._ones:
                made = cupy.ones((), dtype=cupy.float32)
                stream.synchronize()
                self._ones[device] = made
        return self._ones[device]

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """x where the condition holds and y elsewhere, in their dtype: of bfloat16 CuPy itself makes float32."""
        with self.on(x):
            x_bits, y_bits = (number.view(cupy.uint16) for number in (x, y))
            return cupy.where(condition, x_bits, y_bits).view(x.dtype)

    def allocate(self, size: int, like: Array) -> tuple[int, Any]:
        """The address of so many bytes, and what keeps them until the stream is there."""
        with self.on(like):
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
