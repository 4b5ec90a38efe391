"""Which array library computes: NumPy arrays, as files are read into, and what is made of them."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from ringcore.cli.tensors import dtype_of
from ringcore.errors import KeywordError, MissingDependency, UnsupportedError
from ringcore.values import Array, Blocks


class Backend(Protocol):
    """Turns NumPy arrays into those of a library and back, in the same memory if that is the host's."""

    name: str
    kernels: str | None

    def enter(self, x: Array) -> Array:
        """The library's array of x's numbers."""
        ...

    def leave(self, x: Array) -> Array:
        """The NumPy array of x's numbers."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """One whose arrays lie in a device's memory, which may be smaller than a shard."""

    def gpu(self) -> str:
        """What tells the device from all others, of every machine."""
        ...

    def room(self) -> int:
        """How many bytes of the device's memory can be taken now, by all processes on it together."""
        ...

    def fill(self, arrays: Blocks, read: Callable[..., None]) -> Callable[[], None]:
        """Begin to copy what ``read`` puts into NumPy arrays like ``arrays`` to them; the answer waits for it.

        They are not touched before all that was asked of the device so far is done.
        """
        ...


class NumpyBackend:
    """NumPy arrays as they are."""

    def __init__(self, name: str = "numpy", kernels: str | None = None) -> None:
        self.name, self.kernels = name, kernels

    def enter(self, x: Array) -> Array:
        """x itself."""
        return x

    def leave(self, x: Array) -> Array:
        """x itself."""
        return x


class TorchBackend:
    """Torch tensors on the CPU."""

    name = "torch"
    kernels: str | None = None

    def __init__(self) -> None:
        self._torch = _imported("torch")

    def enter(self, x: Array) -> Array:
        """The tensor in x's memory; bfloat16, which NumPy lends from ml_dtypes, passes as int16."""
        if x.dtype.name == "bfloat16":
            return self._torch.from_numpy(x.view("int16")).view(self._torch.bfloat16)
        return self._torch.from_numpy(x)

    def leave(self, x: Array) -> Array:
        """The array in the tensor's memory."""
        if x.dtype == self._torch.bfloat16:
            return x.view(self._torch.int16).numpy().view(dtype_of("bfloat16"))
        return x.numpy()


class CupyBackend:
    """CuPy's arrays on the GPU of this rank; ranks of one machine take its GPUs in turn, ``place`` is this one's."""

    name = "cupy"
    kernels: str | None = None

    def __init__(self, place: int) -> None:
        self._cupy = _imported("cupy", 'pip install "ringcore[cupy]"')
        runtime = self._cupy.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as exc:
            raise UnsupportedError(f"--backend cupy needs a GPU, but CUDA finds none here ({exc}).") from exc
        if count == 0:
            raise UnsupportedError("--backend cupy needs a GPU, but CUDA shows none here (CUDA_VISIBLE_DEVICES?).")
        self._device = self._cupy.cuda.Device(place % count)
        self._device.use()
        self._thread = ThreadPoolExecutor(1, "ringcore reading")

    def enter(self, x: Array) -> Array:
        """A copy of x on the GPU."""
        entered = self._cupy.empty(x.shape, x.dtype)
        entered.set(x)  # asarray would hold a copy in pinned memory besides
        return entered

    def leave(self, x: Array) -> Array:
        """A copy of x in the host's memory."""
        return x.get()

    def gpu(self) -> str:
        """What tells the GPU from all others, of every machine."""
        return f"{platform.node()} {self._cupy.cuda.runtime.deviceGetPCIBusId(self._device.id)}"

    def room(self) -> int:
        """How many bytes of the GPU's memory can be taken now, by all processes on it together."""
        pool = self._cupy.get_default_memory_pool()
        return int(self._cupy.cuda.runtime.memGetInfo()[0]) + int(pool.total_bytes() - pool.used_bytes())

    def fill(self, arrays: Blocks, read: Callable[..., None]) -> Callable[[], None]:
        """Begin to read into memory that the GPU copies from beside its kernels; the answer waits for both."""
        pinned = importlib.import_module("cupyx").empty_pinned
        cuda = self._cupy.cuda
        before = cuda.get_current_stream().record()  # what this memory was used for last

        def fill() -> None:
            with self._device, cuda.Stream(non_blocking=True) as beside:
                held = [pinned(x.shape, x.dtype) for x in arrays]
                read(*held)
                beside.wait_event(before)
                for x, numbers in zip(arrays, held, strict=True):
                    x.set(numbers)
                beside.synchronize()

        return self._thread.submit(fill).result


def find_backend(name: str, place: int = 0) -> Backend:
    """The backend of that name; ``place`` counts the ranks of this machine.

    Raises KeywordError if there is none, MissingDependency if its library is not installed, UnsupportedError if it
    needs a GPU and there is none.
    """
    if name == "numpy":
        return NumpyBackend()
    if name == "reference":
        return NumpyBackend("reference", "reference")
    if name == "torch":
        return TorchBackend()
    if name == "cupy":
        return CupyBackend(place)
    raise KeywordError(f"--backend is {name!r}; it must be one of numpy, reference, torch, cupy.")


def _imported(name: str, remedy: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name:
            raise
        remedy = remedy or f"pip install {name}"
        raise MissingDependency(f"--backend {name} needs {name}, which is not installed: {remedy}.") from exc
