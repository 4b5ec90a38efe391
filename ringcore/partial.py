"""A partial result of attention, and the dtypes in which it is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import array_api_compat

from ringcore.errors import DeviceError, DtypeError, KeywordError, ShapeError
from ringcore.values import Array, Score, namespace

FLOATING = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that attention is defined for, by name."""


@dataclass(frozen=True)
class Partial:
    """Attention of some queries over some of their keys, before the division.

    Shapes: ``weighted`` [B, H, S, E], ``maximum`` and ``total`` [B, H, S].
    Law: weighted = sum of exp(s - maximum) v and total = sum of exp(s - maximum) over the keys seen.
    Units: ``maximum`` is a score (natural-log scale): the largest seen, or a reference so near to it that exp can
    neither overflow nor underflow. It cancels. A row that saw no key is (0, -inf, 0).
    Dtypes: the accumulation dtype, but for ``weighted`` of a fused kernel's result, which may stay in a half type as
    long as every total is 1, or 0 over a row of 0.
    score: what made scores of q.k, where it is known: partials of different ones are of different softmaxes.
    """

    weighted: Array
    maximum: Array
    total: Array
    score: Score | None = None

    @property
    def seen(self) -> Array:
        """Which rows saw a key [B, H, S], bool. `merge`, ``out`` and ``lse`` never read what the others hold."""
        return (self.maximum != -math.inf) & (self.total != 0)

    @property
    def widened(self) -> Partial:
        """The same partial with ``weighted`` in the accumulation dtype, so that others can be added to it."""
        if self.weighted.dtype == self.total.dtype:
            return self
        wide = namespace(self.weighted).astype(self.weighted, self.total.dtype)
        return Partial(wide, self.maximum, self.total, self.score)

    @property
    def out(self) -> Array:
        """The attention output [B, H, S, E]: weighted / total, and 0 where no key was seen."""
        xp = namespace(self.weighted)
        seen = self.seen
        ratio = xp.astype(self.weighted, self.total.dtype) / xp.where(seen, self.total, 1.0)[..., None]
        return xp.where(seen[..., None], ratio, 0.0)

    @property
    def lse(self) -> Array:
        """log of the sum of exp(s) over the keys seen [B, H, S], natural log; -inf where there was none."""
        xp = namespace(self.weighted)
        seen = self.seen
        return xp.where(seen, self.maximum + xp.log(xp.where(seen, self.total, 1.0)), -math.inf)

    @classmethod
    def from_lse(cls, out: Array, lse: Array) -> Partial:
        """The partial of a kernel that returns a normalised output and its log-sum-exp.

        Shapes: ``out`` [B, H, S, E], ``lse`` [B, H, S], natural log; -inf marks a row that saw no key.
        Dtypes: ``out`` may stay in a half type; ``lse`` is float32 or float64.
        Raises ShapeError if the shapes do not fit, DtypeError for an lse in a half type, DeviceError for what are not
        arrays of one library, KeywordError if
        an lse is +inf (some kernels mark empty rows so: convert it to -inf first).
        """
        try:
            xp = namespace(out, lse)
        except TypeError as error:
            raise DeviceError(
                f"out and lse are not arrays of one library: {error}. Convert one of them first."
            ) from error
        if tuple(out.shape[:-1]) != tuple(lse.shape):
            raise ShapeError(
                f"lse has shape {tuple(lse.shape)}, but out of shape {tuple(out.shape)} needs "
                f"{tuple(out.shape[:-1])}: one number per row. Drop or move the extra axes first."
            )
        if dtype_name(out) not in FLOATING:
            raise DtypeError(f"out holds {dtype_name(out)}; it must hold one of {', '.join(FLOATING)}.")
        if dtype_name(lse) not in ("float32", "float64"):
            raise DtypeError(
                f"lse is {dtype_name(lse)}; a half type loses the weights of merged partials. "
                "Ask the kernel for a float32 lse."
            )
        if known(xp.any(lse == math.inf)):
            raise KeywordError("lse holds +inf, which marks empty rows in some kernels: replace it by -inf first.")
        empty = lse == -math.inf
        return cls(
            xp.where(empty[..., None], xp.zeros_like(out), out),
            lse,
            xp.where(empty, xp.zeros_like(lse), xp.ones_like(lse)),
        )


def accumulation_dtype(x: Array) -> Array:
    """The dtype in which sums over x are kept: float64 for float64, float32 for everything narrower."""
    xp = namespace(x)
    return xp.float64 if dtype_name(x) == "float64" else xp.float32


def dtype_name(x: Array) -> str:
    """The dtype of x as a bare name such as "float32", the same in every library."""
    return str(x.dtype).rpartition(".")[2]


def device_kind(x: Array) -> str:
    """The kind of device that x is on: "cpu", "cuda", or a library's own word."""
    name = str(array_api_compat.device(x)).removeprefix("<")  # CuPy's is "<CUDA Device 0>"
    return name.partition(":")[0].partition(" ")[0].lower()


def known(condition: Array) -> bool:
    """The condition's value, or False while a compiler traces it and it has none."""
    try:
        return bool(condition)
    except TypeError:
        return False
