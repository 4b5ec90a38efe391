"""What the kernels ask of a library of arrays on GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from ringcore import Array


class Arrays(Protocol):
    """Addresses, memory and streams, beside what the array API standard has."""

    @property
    def xp(self) -> Any:
        """The library's namespace, as array-api-compat has it."""
        ...

    def address(self, x: Array) -> int:
        """Where x begins."""
        ...

    def strides(self, x: Array) -> tuple[int, ...]:
        """The strides of x, in elements."""
        ...

    def empty(self, shape: tuple[int, ...], like: Array, dtype: Any = None) -> Array:
        """New memory, rows last, on the device of ``like`` and in its dtype, if there is no other."""
        ...

    def ones(self, like: Array) -> Array:
        """The number 1 for each of ``like``, in float32: one number, kept where it can be, for nobody writes to it.

        To make it takes as long as the launch of any kernel. Of a single row it is fresh memory, which others may take
        for their own.
        """
        ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """x where the condition holds and y elsewhere, in their dtype, a half type."""
        ...

    def allocate(self, size: int, like: Array) -> tuple[int, Any]:
        """The address of so many bytes on the device of ``like``, which is the current one, and what keeps them.

        Let go of, they serve only what the same stream does later.
        """
        ...

    def device(self, x: Array) -> int:
        """The number of the device of x."""
        ...

    def stream(self, x: Array) -> int:
        """The address of the current stream on the device of x."""
        ...

    def on(self, x: Array) -> AbstractContextManager[Any]:
        """A context in which the device of x is the current one."""
        ...

    def deterministic(self) -> bool:
        """Whether the user wants gradients that are equal from run to run."""
        ...

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        ...
