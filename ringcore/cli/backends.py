"""Which array library computes: NumPy arrays, as files are read into, and what is made of them."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from ringcore.cli.tensors import dtype_of
from ringcore.errors import KeywordError, MissingDependency
from ringcore.values import Array


class Backend(Protocol):
    """Turns NumPy arrays into those of a library and back, in the same memory."""

    name: str
    kernels: str | None

    def enter(self, x: Array) -> Array:
        """The library's array in x's memory."""
        ...

    def leave(self, x: Array) -> Array:
        """The NumPy array in x's memory."""
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


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises KeywordError if there is none, MissingDependency if its library is not installed.
    """
    if name == "numpy":
        return NumpyBackend()
    if name == "reference":
        return NumpyBackend("reference", "reference")
    if name == "torch":
        return TorchBackend()
    raise KeywordError(f"--backend is {name!r}; it must be one of numpy, reference, torch.")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name:
            raise
        raise MissingDependency(f"--backend {name} needs {name}, which is not installed: pip install {name}.") from exc
