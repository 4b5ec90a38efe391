"""Array libraries as the questions need them: arrays made and read, and gradients taken in each one's own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ringcore.testing.problem import Floats

GRADIENTS = ("dq", "dk", "dv")


class NoArray(TypeError):
    """What attention gave is no array of the library."""


class Library:
    """NumPy, which has no gradients.

    devices: where its arrays may be; device: where they are, the first of those if nothing is said.
    """

    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, dtype: str, device: str | None = None) -> None:
        self.dtype, self.device = dtype, device

    def settle(self, rank: int) -> None:
        """Take the device of this rank, where each has its own."""

    def gpu(self) -> str | None:
        """The name of the GPU where its arrays are, None if they are on none."""
        return None

    def make(self, x: Floats) -> Any:
        """An array of this library in the dtype that is asked about."""
        return x.astype(self.dtype)

    def plain(self, x: Any) -> Any:
        """An array of another dtype, such as a mask."""
        return x

    def back(self, x: Any) -> Floats:
        """As NumPy has it, in float64."""
        return np.asarray(x).astype(np.float64)

    def dtype_of(self, x: Any) -> str:
        """The bare name of its dtype."""
        return str(x.dtype).rpartition(".")[2]

    def call(self, attention: Callable[..., Any], arrays: list[Any], dout: Floats | None, **keywords: Any) -> Any:
        """out, and with ``dout`` the gradients if the library makes any, by name."""
        return {"out": self.out_of(attention(*arrays, **keywords))}

    def out_of(self, result: Any) -> Any:
        """out of what attention gives. Raises NoArray."""
        out = first(result)
        if not self.holds(out):
            raise NoArray(f"gave a {type(out).__name__}, not an array")
        return out

    def holds(self, x: Any) -> bool:
        """Whether it is an array that can be read."""
        return hasattr(x, "shape") and hasattr(x, "dtype")


class Torch(Library):
    """Torch's tensors, and autograd."""

    devices = "cpu", "cuda"

    def settle(self, rank: int) -> None:
        """As `Library.settle`."""
        if self.device == "cuda":
            import torch

            torch.cuda.set_device(rank % _some_gpus("torch", torch.cuda.device_count()))

    def gpu(self) -> str | None:
        """As `Library.gpu`."""
        import torch

        return torch.cuda.get_device_name() if self.device == "cuda" else None

    def make(self, x: Floats) -> Any:
        """As `Library.make`."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device or "cpu", getattr(torch, self.dtype))

    def plain(self, x: Any) -> Any:
        """As `Library.plain`."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device or "cpu")

    def back(self, x: Any) -> Floats:
        """As `Library.back`."""
        return np.asarray(x.detach().double().cpu().numpy())

    def holds(self, x: Any) -> bool:
        """As `Library.holds`: autograd and ``back`` are of tensors alone."""
        import torch

        return isinstance(x, torch.Tensor)

    def call(self, attention: Callable[..., Any], arrays: list[Any], dout: Floats | None, **keywords: Any) -> Any:
        """As `Library.call`."""
        import torch

        if dout is None:
            return super().call(attention, arrays, dout, **keywords)
        leaves = [x.detach().requires_grad_() for x in arrays]
        out = self.out_of(attention(*leaves, **keywords))
        found = torch.autograd.grad(out, leaves, self.make(dout), allow_unused=True, materialize_grads=True)
        return {"out": out.detach(), **dict(zip(GRADIENTS, found, strict=True))}


class Jax(Library):
    """JAX's arrays, and its vector-Jacobian products."""

    devices = "cpu", "cuda"

    def gpu(self) -> str | None:
        """As `Library.gpu`."""
        import jax

        return str(jax.devices("cuda")[0].device_kind) if self.device == "cuda" else None

    def make(self, x: Floats) -> Any:
        """As `Library.make`."""
        return self._placed(x, self.dtype)

    def plain(self, x: Any) -> Any:
        """As `Library.plain`."""
        return self._placed(x, None)

    def _placed(self, x: Any, dtype: str | None) -> Any:
        """Where JAX puts it by itself, if nothing is said: only then may it move to other devices."""
        import jax

        device = None if self.device is None else jax.devices(self.device)[0]
        return jax.numpy.asarray(x, dtype=dtype, device=device)

    def call(self, attention: Callable[..., Any], arrays: list[Any], dout: Floats | None, **keywords: Any) -> Any:
        """As `Library.call`."""
        import jax

        if dout is None:
            return super().call(attention, arrays, dout, **keywords)
        out, pull_back = jax.vjp(lambda *given: self.out_of(attention(*given, **keywords)), *arrays)
        return {"out": out, **dict(zip(GRADIENTS, pull_back(self.make(dout)), strict=True))}


class CuPy(Library):
    """CuPy's arrays, which have no gradients."""

    devices = ("cuda",)

    def settle(self, rank: int) -> None:
        """As `Library.settle`."""
        import cupy

        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError:  # no driver
            count = 0
        cupy.cuda.Device(rank % _some_gpus("cupy", count)).use()

    def gpu(self) -> str | None:
        """As `Library.gpu`."""
        import cupy

        return str(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode())

    def make(self, x: Floats) -> Any:
        """As `Library.make`."""
        import cupy

        return cupy.asarray(x.astype(self.dtype))

    def plain(self, x: Any) -> Any:
        """As `Library.plain`."""
        import cupy

        return cupy.asarray(x)

    def back(self, x: Any) -> Floats:
        """As `Library.back`."""
        import cupy

        return np.asarray(cupy.asnumpy(x)).astype(np.float64)


LIBRARIES = {"numpy": Library, "torch": Torch, "jax": Jax, "cupy": CuPy}
DEVICES = "cpu", "cuda"


def library_of(name: str, dtype: str, device: str | None = None) -> Library:
    """The library of this name. Raises ValueError for one that is not known, or is not on that device."""
    if name not in LIBRARIES:
        raise ValueError(f"library is {name!r}; it must be one of {', '.join(LIBRARIES)}.")
    kind = LIBRARIES[name]
    if device is not None and device not in kind.devices:
        raise ValueError(f"device is {device!r}; arrays of {name} are on {' or '.join(kind.devices)}.")
    return kind(dtype, device)


def first(result: Any) -> Any:
    """out of what attention gives: it may bring lse."""
    return result[0] if isinstance(result, (tuple, list)) and result else result


def _some_gpus(library: str, count: int) -> int:
    """How many GPUs there are. Raises RuntimeError if there is none."""
    if count == 0:
        raise RuntimeError(f"device is 'cuda', but {library} sees no GPU here.")
    return count
