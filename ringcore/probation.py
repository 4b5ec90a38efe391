"""Fused kernels on probation: before their first use they are held against the reference kernels on a small tile."""

from __future__ import annotations

import math
from typing import Any
from weakref import finalize

import array_api_compat

from ringcore.grouping import grouped
from ringcore.merge import empty_partial, finished_lse, merge
from ringcore.partial import Partial, dtype_name
from ringcore.protocols import Kernels
from ringcore.tile import ReferenceKernels
from ringcore.values import Array, Band, Gradients, Score, Tile, namespace

_SIDE = 48
# Far above rounding, far below what a wrong base, sentinel, order of axes or scale does.
_TOLERANCE = {"float16": 0.02, "bfloat16": 0.04, "float32": 1e-3, "float64": 1e-8}
_ONE, _TWO, _SPAN = slice(0, 1), slice(0, 2), (range(_SIDE),)
_TILE = Tile(_ONE, _TWO, _ONE, slice(0, _SIDE), slice(0, _SIDE), _SPAN, _SPAN, Band(None, 0))


def _square(rows: range, columns: range) -> Tile:
    height, width = slice(rows.start, rows.stop, 1), slice(columns.start, columns.stop, 1)
    band = Band(None, 0).clipped(len(rows), len(columns))
    return Tile(_ONE, _TWO, _ONE, height, width, (rows,), (columns,), band)


(_PARTS,) = grouped(
    _square(range(a, b), range(c, d)) for a, b, c, d in ((0, 16, 0, 16), (20, 21, 20, 21), (21, 40, 25, 44))
)
_REFERENCE = ReferenceKernels()
_found: dict[int, dict[tuple[Any, ...], str | None]] = {}


def fault(kernels: Kernels, q: Array, v: Array, needs: frozenset[str]) -> str | None:
    """What is wrong with fused kernels on q's device, for its dtype and these widths; None if nothing is.

    Looked at once, and not while a graph is captured: there, nothing can be read.
    """
    if not kernels.capabilities.fused:
        return None
    asked = needs & {"bias", "mask", "dropout", "gradient", "bias_gradient"}
    key = str(array_api_compat.device(q)), dtype_name(q), q.shape[3], v.shape[3], asked
    try:
        known = _found.setdefault(id(kernels), {})
        if not known:
            finalize(kernels, _found.pop, id(kernels), None)
    except TypeError:  # nothing tells when they end, so nothing is remembered of them
        known = {}
    if key not in known and not getattr(kernels, "capturing", bool)():
        known[key] = _tried(kernels, q, v.shape[3], asked)
    return known.get(key)


def _tried(kernels: Kernels, like: Array, width: int, asked: frozenset[str]) -> str | None:
    q, k, v, dout = (
        _waves(like, heads, columns, phase)
        for heads, columns, phase in (
            (2, like.shape[3], 0.1),
            (1, like.shape[3], 0.7),
            (1, width, 1.3),
            (2, width, 1.9),
        )
    )
    xp, score = namespace(q), Score(1 / math.sqrt(like.shape[3]), dropout=0.25 if "dropout" in asked else 0.0)
    numbers = xp.arange(_SIDE, dtype=xp.int64, device=array_api_compat.device(q))
    mask = (numbers[:, None] + numbers[None, :]) % 7 > 0
    mask = (mask & (numbers != 5)[:, None])[None, None, :, :]  # row 5 sees nothing
    bias = xp.where((numbers[:, None] * 3 + numbers[None, :]) % 11 > 0, _waves(like, 2, _SIDE, 2.3), -math.inf)
    terms = {name: x for name, x in (("bias", bias), ("mask", mask)) if name in asked}
    keywords: dict[str, Any] = {"score": score, "tile": _TILE, **terms}
    try:
        due = _REFERENCE.forward(q, k, v, **keywords)
        part = kernels.forward(q, k, v, **keywords)
        came = merge(empty_partial(q, width), part)
        found = {"out": (came.out, due.out), "lse": _lse(came, due)}
        if "gradient" in asked:
            found |= _gradients(kernels, (dout, q, k, v), due, keywords, keywords, "bias_gradient" in asked)
        if kernels.capabilities.parts:
            found |= _in_parts(kernels, (dout, q, k, v), numbers, score, "gradient" in asked)
        errors = {name: _distance(*pair) for name, pair in found.items()}
    except Exception as error:  # whatever it is, other kernels may do better
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise  # it says nothing of the kernels
        return f"they failed on a small tile ({type(error).__name__}: {error})"
    wrong = [f"{name} is off by {size:.1e}" for name, size in errors.items() if not size <= _TOLERANCE[dtype_name(q)]]
    return f"their results on a small tile are wrong ({', '.join(wrong)}; relative)" if wrong else None


def _gradients(
    kernels: Kernels, arrays: tuple[Array, Array, Array, Array], due: Partial, keywords: dict[str, Any],
    of_reference: dict[str, Any], of_bias: bool,
) -> dict[str, tuple[Array, Array]]:  # fmt: skip
    """Each gradient of the kernels, and that of the reference, which may be told in another way what is seen."""
    dout, *inputs = arrays
    xp, wide = namespace(dout), due.out
    given = *arrays, due.maximum, due.total
    rows = {
        "out": xp.astype(wide, dout.dtype),
        "lse": finished_lse(due.maximum, due.total, math.inf),
        "dlse": None,
    }
    dbias = xp.zeros_like(xp.astype(keywords["bias"], wide.dtype)) if of_bias else None
    own = kernels.backward(*given, None, into=Gradients(dbias=dbias), **{**keywords, **rows})
    delta = xp.sum(wide * xp.astype(dout, wide.dtype), axis=-1)
    zeros = Gradients(*(xp.zeros_like(xp.astype(x, wide.dtype)) for x in (*inputs, *([dbias] if of_bias else []))))
    sums = _REFERENCE.backward(*given, delta, into=zeros, **of_reference)
    names = ("dq", "dk", "dv", "dbias") if of_bias else ("dq", "dk", "dv")
    return {name: (getattr(own, name), getattr(sums, name)) for name in names}


def _in_parts(
    kernels: Kernels, arrays: tuple[Array, Array, Array, Array], numbers: Array, score: Score, gradient: bool
) -> dict[str, tuple[Array, Array]]:
    """The same for a tile with parts, between which rows see nothing and keys are not seen."""
    dout, q, k, v = (x[:, :, :length, ...] for x, length in zip(arrays, (40, 40, 44, 44), strict=True))
    i, j = numbers[:40][:, None], numbers[:44][None, :]
    seen = i < 0
    for _, rows, keys in _PARTS.places():
        inside = (i >= rows.start) & (i < rows.stop) & (j >= keys.start) & (j < keys.stop)
        seen = seen | (inside & (j - keys.start <= i - rows.start))
    whole = Tile(_ONE, _TWO, _ONE, slice(0, 40), slice(0, 44), (range(40),), (range(44),))
    of_reference = {"score": score, "tile": whole, "mask": seen[None, None, :, :]}
    due = _REFERENCE.forward(q, k, v, **of_reference)
    came = merge(empty_partial(q, v.shape[3]), kernels.forward(q, k, v, score=score, tile=_PARTS))
    found = {"out": (came.out, due.out), "lse": _lse(came, due)}
    if gradient:
        own = {"score": score, "tile": _PARTS}
        found |= _gradients(kernels, (dout, q, k, v), due, own, of_reference, of_bias=False)
    return {f"{name} in parts": pair for name, pair in found.items()}


def _waves(like: Array, heads: int, columns: int, phase: float) -> Array:
    """Numbers [1, heads, side, columns] around 0.25, in no pattern, of the library, dtype and device of ``like``."""
    xp = namespace(like)
    count = heads * _SIDE * columns
    steps = xp.arange(count, dtype=xp.float32, device=array_api_compat.device(like))
    # Squares, so that neighbours have nothing in common: sums of a pattern would cancel, and hide what is due.
    waves = xp.sin(steps * (steps * 0.37 + phase)) + 0.25
    return xp.astype(xp.reshape(waves, (1, heads, _SIDE, columns)), like.dtype)


def _lse(came: Partial, due: Partial) -> tuple[Array, Array]:
    """Both as they are, with equal numbers where both say that a row saw nothing."""
    xp = namespace(came.weighted)
    empty = (came.lse == -math.inf) & (due.lse == -math.inf)
    return xp.where(empty, 0.0, came.lse), xp.where(empty, 0.0, due.lse)


def _distance(came: Array, due: Array) -> float:
    """The largest difference over the largest number that was due; infinite for NaN."""
    xp = namespace(due)
    came = xp.astype(came, due.dtype)
    largest = float(xp.max(xp.abs(came - due))) / max(float(xp.max(xp.abs(due))), 1e-30)
    return largest if math.isfinite(largest) else math.inf
