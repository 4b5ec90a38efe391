"""The keywords of a call, one by one: each in full, or the error that says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import array_api_compat

from ringcore.documents import Documents
from ringcore.errors import KeywordError, UnsupportedError
from ringcore.integers import integers_of_entries, is_integer
from ringcore.partial import FLOATING, accumulation_dtype, dtype_name
from ringcore.values import Array, namespace


def check_flag(name: str, value: Any) -> None:
    """Raise KeywordError unless ``value`` is True or False, also as NumPy's scalar."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise KeywordError(f"{name} is {value!r}; it must be True or False.")


def check_window(window: Any, causal: bool) -> tuple[int | None, int | None]:
    """``window`` as (left, right); an int w counts the positions that a causal query sees, itself included."""
    if window is None:
        return None, None
    if is_integer(window):
        if not causal:
            raise KeywordError(
                f"window is the single number {window}, which is defined for causal=True only. "
                "Give (left, right) for a window on both sides."
            )
        if window < 1:
            raise KeywordError(f"window is {window}, but a query sees at least itself: give 1 or more.")
        return int(window) - 1, 0
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise KeywordError(f"window is {window!r}; it must be (left, right), None, or with causal=True a number.")
    for side in window:
        if side is not None and (not is_integer(side) or side < 0):
            raise KeywordError(
                f"window is {window!r}; each side must be None (unbounded) or an integer from 0 (itself only) on."
            )
    left, right = (None if side is None else int(side) for side in window)
    return left, right


def check_scale(scale: Any, q: Array) -> float:
    """The number that scores are multiplied by; 1/sqrt(D) if none was given."""
    if scale is None:
        return float(1 / math.sqrt(q.shape[3]))
    return _number("scale", scale, q)


def check_softcap(softcap: Any, q: Array) -> float | None:
    """The cap of scores, larger than 0 also in their dtype."""
    if softcap is None:
        return None
    value = _number("softcap", softcap, q)
    # A cap is divided by: one that rounds to 0 in the scores' dtype would give NaN.
    smallest = float(namespace(q).finfo(accumulation_dtype(q)).smallest_normal)
    if value < smallest:
        due = "larger than 0" if value <= 0 else f"at least {smallest:.2g} for {dtype_name(q)} arrays"
        raise KeywordError(f"softcap is {softcap!r}; it must be {due}, or None for no cap.")
    return value


def check_dropout(rate: Any, seed: Any, q: Array) -> tuple[float, int]:
    """The rate, from 0 to less than 1, and the seed, 0 if nothing is drawn."""
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= float(rate) < 1:
        raise KeywordError(f"dropout is {rate!r}; it must be a rate from 0 on, and less than 1.")
    if seed is None and float(rate) > 0:
        raise KeywordError(
            f"dropout is {rate}, but there is no dropout_seed. Give a whole number, the same on every rank and another "
            "for each call."
        )
    if seed is not None and (not is_integer(seed) or not 0 <= seed < 1 << 64):
        raise KeywordError(f"dropout_seed is {seed!r}; it must be a whole number of 64 bits, 0 or more.")
    xp = namespace(q)
    if float(rate) > 0 and xp.arange(1, dtype=xp.int64, device=array_api_compat.device(q)).dtype != xp.int64:
        raise UnsupportedError(
            "dropout is drawn with integers of 64 bits, but the library makes shorter ones of them. For JAX call "
            'jax.config.update("jax_enable_x64", True) first.'
        )
    return float(rate), 0 if seed is None or not rate else int(seed)


def _number(name: str, value: Any, q: Array) -> float:
    """A real number on the host that the scores' dtype can hold."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    dtype = str(getattr(value, "dtype", "")).rpartition(".")[2]
    if not real and not (getattr(value, "shape", None) == () and (is_integer(value) or dtype in FLOATING)):
        raise KeywordError(f"{name} is {value!r}; it must be a real number.")
    if getattr(value, "requires_grad", False) is True:
        raise UnsupportedError(f"{name} requires grad, but no gradient with respect to it is made. Give a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    xp, wide = namespace(q), "float64" if dtype_name(q) == "float64" else "float32"
    if not abs(number) <= float(xp.finfo(accumulation_dtype(q)).max):  # so that NaN fails, too
        raise KeywordError(f"{name} is {number}; it must be finite in {wide}, in which scores are kept.")
    return number


def check_documents(documents: Documents | None, batch: int) -> Documents | None:
    """The documents, of all batch entries or of each one."""
    if documents is not None and len(documents.runs) not in (1, batch):
        raise KeywordError(
            f"documents has {len(documents.runs)} rows; it must be [N] for all {batch} batch entries, or one row for "
            "each of them."
        )
    return documents


def check_offsets(query_offset: Any, batch: int) -> tuple[int, ...]:
    """The position of q's first row for each batch entry; raises KeywordError."""
    return tuple(integers_of_entries("query_offset", query_offset, batch, one_for_all=True))


def check_key_lengths(key_lengths: Any, batch: int) -> tuple[int, ...]:
    """How many keys each batch entry has; raises KeywordError."""
    lengths = tuple(integers_of_entries("key_lengths", key_lengths, batch, one_for_all=False))
    if min(lengths, default=0) < 0:
        raise KeywordError(f"key_lengths is {list(lengths)}; a number of keys is 0 or more.")
    return lengths
