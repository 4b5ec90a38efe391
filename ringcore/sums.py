"""Sums of what many tiles give to the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat

from ringcore.arrays import add
from ringcore.partial import accumulation_dtype
from ringcore.protocols import Arithmetic
from ringcore.values import Array, namespace

WAITING = 2  # times all rows: so much may wait to be brought together in one pass


class Sum:
    """The sum of a gradient's parts, each of some of its rows.

    One part of all rows is taken as it is, also in a half type. The last part is added when the sum is taken: two in a
    half type are then rounded once, as their sum in the accumulation dtype would be.
    """

    def __init__(self, like: Array, together: Callable[..., Array | None] | None = None) -> None:
        self._like = like
        self._total: Array | None = None
        self._last: tuple[tuple[Any, ...], Array] | None = None
        self._together = together
        self._waiting: list[tuple[tuple[Any, ...], Array]] = []

    def settle(self, coming: int = 0) -> None:
        """Add what was kept for the last, which it is not. coming: how many rows the next part has."""
        if self._waiting:
            held = sum(math.prod(part.shape[:3]) for _, part in self._waiting)
            if held + coming > WAITING * math.prod(self._like.shape[:3]):
                self._add_waiting()
        if self._last is not None:
            self._total = add(widened(self._started()), *self._last)
            self._last = None

    def add(self, index: tuple[Any, ...], part: Array) -> None:
        """One part more, of the rows at ``index``."""
        if self._together is not None:
            self._waiting.append((index, part))
            return
        self.settle()
        if self._total is None and part.shape == self._like.shape:
            self._total = part
        else:
            self._last = index, part

    def take(self, last: bool = True) -> Array:
        """The sum, in the dtype of its parts if they are two at most, else in the accumulation dtype.

        last: nothing is added to it any more. Else it is in a half type only if it is one part. Parts that were brought
        together in one pass are rounded once, to the dtype of what the gradient is of.
        """
        if last and self._together is not None and len(self._waiting) > 2:
            found = self._together(self._like, self._waiting, self._like.dtype)
            if found is not None:
                self._waiting, self._total, self._together = [], found, None
                return found
        self._add_waiting()
        if self._last is None:
            return self._started()
        total, (_, part) = self._started(), self._last
        return add(total if last and total.dtype == part.dtype else widened(total), *self._last)

    def _add_waiting(self) -> None:
        """From now on one is added after the other."""
        waiting, self._waiting, self._together = self._waiting, [], None
        for index, part in waiting:
            self.add(index, part)

    def _started(self) -> Array:
        return zeros(self._like) if self._total is None else self._total


def gathers(arithmetic: Arithmetic, x: Array) -> bool:
    """Whether many partials and parts of gradients on x's device are better brought together in one pass."""
    asked = getattr(arithmetic, "gathers", None)
    return asked is not None and bool(asked(x))


def zeros(x: Array) -> Array:
    """Zeros like x, in the accumulation dtype."""
    xp = namespace(x)
    return xp.zeros(x.shape, dtype=accumulation_dtype(x), device=array_api_compat.device(x))


def widened(x: Array) -> Array:
    """x in the accumulation dtype."""
    return namespace(x).astype(x, accumulation_dtype(x), copy=False)
