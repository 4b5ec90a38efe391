"""Array libraries as the questions need them: arrays made and read, and gradients taken in each one's own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ringcore.testing.problem import Floats, Question

GRADIENTS = ("dq", "dk", "dv")


class Library:
    """NumPy, which has no gradients."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

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

    def rounded(self, question: Question) -> Question:
        """The question with numbers that the dtype has, so that rounding them is no mistake."""
        names = "q", "k", "v", "dout"
        numbers: dict[str, Any] = {name: self.back(self.make(getattr(question.problem, name))) for name in names}
        return replace(question, problem=replace(question.problem, **numbers))

    def call(self, attention: Callable[..., Any], arrays: list[Any], dout: Floats | None, **keywords: Any) -> Any:
        """out, and with ``dout`` the gradients if the library makes any, by name."""
        return {"out": _first(attention(*arrays, **keywords))}


class Torch(Library):
    """Torch's tensors on the CPU, and autograd."""

    def make(self, x: Floats) -> Any:
        """As `Library.make`."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, self.dtype))

    def plain(self, x: Any) -> Any:
        """As `Library.plain`."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(x))

    def back(self, x: Any) -> Floats:
        """As `Library.back`."""
        return np.asarray(x.detach().double().cpu().numpy())

    def call(self, attention: Callable[..., Any], arrays: list[Any], dout: Floats | None, **keywords: Any) -> Any:
        """As `Library.call`."""
        import torch

        if dout is None:
            return super().call(attention, arrays, dout, **keywords)
        leaves = [x.detach().requires_grad_() for x in arrays]
        out = _first(attention(*leaves, **keywords))
        found = torch.autograd.grad(out, leaves, self.make(dout))
        return {"out": out.detach(), **dict(zip(GRADIENTS, found, strict=True))}


class Jax(Library):
    """JAX's arrays, and its vector-Jacobian products."""

    def make(self, x: Floats) -> Any:
        """As `Library.make`."""
        import jax.numpy as jnp

        return jnp.asarray(x, dtype=self.dtype)

    def call(self, attention: Callable[..., Any], arrays: list[Any], dout: Floats | None, **keywords: Any) -> Any:
        """As `Library.call`."""
        import jax

        if dout is None:
            return super().call(attention, arrays, dout, **keywords)
        out, pull_back = jax.vjp(lambda *given: _first(attention(*given, **keywords)), *arrays)
        return {"out": out, **dict(zip(GRADIENTS, pull_back(self.make(dout)), strict=True))}


LIBRARIES = {"numpy": Library, "torch": Torch, "jax": Jax}


def library_of(name: str, dtype: str) -> Library:
    """The library of this name. Raises ValueError for one that is not known."""
    if name not in LIBRARIES:
        raise ValueError(f"library is {name!r}; it must be one of {', '.join(LIBRARIES)}.")
    return LIBRARIES[name](dtype)


def _first(result: Any) -> Any:
    """out of what attention gives: it may bring lse."""
    return result[0] if isinstance(result, tuple) else result
