"""The check of random output rows against dense float64 attention, streamed from the files.

It shares no arithmetic with the ring: two passes over the keys, first for each row's maximum, then for its sums.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ringcore.cli.tensors import Stored, dtype_of, read_rows
from ringcore.dilation import Dilation
from ringcore.values import Array

_BYTES = 8 << 20  # what a block of keys, and its scores, may take
_TOGETHER = 16  # rows that share one reading of the keys
_ROUNDING = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
# lse stays wide for half types, but the fused kernels for them take exp to about 14 bits: an error of up to 6e-5.
_LSE_ROUNDING = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-4, "bfloat16": 2e-4}
_NOTHING = 1e-30  # a key of less weight says nothing about the digits of a row (a bias of finfo.min, say)
_USUAL_LOGIT = 16.0  # scores beyond it lose digits in proportion


@dataclass(frozen=True)
class Question:
    """What was computed, in terms of the files: the arrays in file order, and every keyword in full.

    dtype: what the inputs were converted to. axis: that of the sequence in q, k, v and out.
    """

    q: Stored
    k: Stored
    v: Stored
    bias: Stored | None
    mask: Stored | None
    dtype: str
    axis: int
    causal: bool
    window: tuple[int | None, int | None]
    scale: float
    softcap: float | None
    offsets: tuple[int, ...]
    key_lengths: tuple[int, ...] | None
    dilation: Dilation | None


def chosen_rows(length: int, count: int, seed: int) -> list[int]:
    """``count`` different random rows out of ``length``, sorted; all of them if there are no more."""
    return sorted(random.Random(seed).sample(range(length), min(count, length)))


def check_rows(question: Question, rows: Sequence[int], out: Stored, lse: Stored | None) -> dict[str, Any]:
    """The largest errors of these rows of the written ``out`` and ``lse``, and the largest score that counts.

    An error of out is relative to the largest visible absolute value of v for that row and head; one of lse to the
    larger of 1 and its own size. NaN where a number was due, or the reverse, is an infinite error.
    """
    worst: dict[str, Any] = {"rows": len(rows), "out": 0.0, "lse": 0.0, "logit": 0.0}
    for first in range(0, len(rows), _TOGETHER):
        some = rows[first : first + _TOGETHER]
        due, due_lse, largest_v, logit = _dense(question, some)
        came = _read(out, question.axis, some)
        worst["out"] = max(worst["out"], _error(came, due, np.where(largest_v > 0, largest_v, 1.0)[..., None]))
        if lse is not None:
            worst["lse"] = max(worst["lse"], _error(_read(lse, 2, some), due_lse, np.maximum(1.0, np.abs(due_lse))))
        worst["logit"] = max(worst["logit"], logit)
    return worst


def verdict(notes: Sequence[dict[str, Any]], dtype: str, lse: bool) -> dict[str, Any]:
    """All ranks' errors as one, with the tolerance and whether it was kept."""
    largest = {name: max(note[name] for note in notes) for name in ("out", "lse", "logit")}
    factor = max(1.0, largest["logit"] / _USUAL_LOGIT)
    tolerances = {
        "out": _ROUNDING[dtype] * factor,
        "lse": _LSE_ROUNDING[dtype] * factor,
    }
    names = ("out", "lse") if lse else ("out",)
    found: dict[str, Any] = {"rows": sum(note["rows"] for note in notes), "largest_logit": largest["logit"]}
    for name in names:
        found[f"{name}_error"], found[f"{name}_tolerance"] = largest[name], tolerances[name]
    found["passed"] = all(largest[name] <= tolerances[name] for name in names)
    return found


def _dense(question: Question, rows: Sequence[int]) -> tuple[Array, Array, Array, float]:
    """out [B, H, R, E], lse and the largest visible |v| [B, H, R], and the largest |score| that counts."""
    q = _read(question.q, question.axis, rows, question.dtype)
    group = q.shape[1] // _heads(question.k, question.axis)
    top = np.full(q.shape[:3], -math.inf)
    logit = 0.0
    for span in _spans(question, q):
        scores = _scores(question, q, rows, span, group)
        top = np.maximum(top, scores.max(axis=-1, initial=-math.inf))
    base = np.where(np.isneginf(top), 0.0, top)
    width = question.v.shape[3]
    total, weighted, largest = np.zeros(top.shape), np.zeros((*top.shape, width)), np.zeros(top.shape)
    for span in _spans(question, q):
        scores = _scores(question, q, rows, span, group)
        weights = np.exp(scores - base[..., None])
        v = np.repeat(_read(question.v, question.axis, span, question.dtype), group, axis=1)
        seen: Array = ~np.isneginf(scores)
        telling = np.abs(np.where((weights > _NOTHING) & np.isfinite(scores), scores, 0.0))
        logit = max(logit, float(telling.max(initial=0.0)))
        total += weights.sum(axis=-1)
        sizes = np.where(np.isfinite(v), np.abs(v), 0.0).max(axis=-1)
        largest = np.maximum(largest, np.where(seen, sizes[:, :, None, :], 0.0).max(axis=-1, initial=0.0))
        weighted += weights @ np.where(np.isfinite(v), v, 0.0)
        for key in np.flatnonzero(~np.isfinite(v).all(axis=(0, 1, 3))):  # what is hidden must not reach a row
            value = np.where(np.isfinite(v[:, :, key]), 0.0, v[:, :, key])[:, :, None]
            weighted += np.where(seen[..., key, None], value, 0.0)
    some = ~np.isneginf(top)
    out = np.where(some[..., None], weighted / np.where(some, total, 1.0)[..., None], 0.0)
    return out, np.where(some, base + np.log(np.where(some, total, 1.0)), -math.inf), largest, logit


def _scores(question: Question, q: Array, rows: Sequence[int], span: range, group: int) -> Array:
    """The scores of the rows against the keys of ``span`` [B, H, R, T], -inf where hidden."""
    k = np.repeat(_read(question.k, question.axis, span, question.dtype), group, axis=1)
    scores = np.einsum("bhrd,bhtd->bhrt", q, k) * question.scale
    if question.softcap is not None:
        scores = question.softcap * np.tanh(scores / question.softcap)
    if question.dilation is not None:  # as often as branches show a pair
        with np.errstate(divide="ignore"):
            scores = scores + np.log(_times(question.dilation, scores.shape[1], np.asarray(rows), np.asarray(span)))
    if question.bias is not None:
        scores = scores + _term(question.bias, rows, span)
    keys = np.asarray(span)
    for entry, offset in enumerate(question.offsets):
        positions = np.asarray(rows)[:, None] + offset
        hidden = np.zeros((len(rows), len(keys)), dtype=bool)
        if question.causal:
            hidden |= keys > positions
        left, right = question.window
        if left is not None:
            hidden |= positions - keys > left
        if right is not None:
            hidden |= keys - positions > right
        if question.key_lengths is not None:
            hidden |= keys >= question.key_lengths[entry]
        scores[entry] = np.where(hidden, -math.inf, scores[entry])
    if question.mask is not None:
        scores = np.where(_term(question.mask, rows, span) != 0, scores, -math.inf)
    if question.bias is not None:  # -inf hides, whatever the score was
        scores = np.where(np.isneginf(_term(question.bias, rows, span)), -math.inf, scores)
    return scores


def _times(dilation: Dilation, heads: int, rows: Array, keys: Array) -> Array:
    """How many branches show each pair [H, R, T]."""
    found, head = np.zeros((heads, len(rows), len(keys))), np.arange(heads)
    for length, rate in dilation.branches:
        offset = head % rate if dilation.head_offset == "modulo" else head // -(-heads // rate)
        kept_rows, kept_keys = (places % length % rate == offset[:, None] for places in (rows, keys))
        found += (rows[:, None] // length == keys // length) & kept_rows[:, :, None] & kept_keys[:, None, :]
    return found


def _term(term: Stored, rows: Sequence[int], span: range) -> Array:
    """The rows and columns of a bias or mask, in as many axes as the file has."""
    *lead, height, width = term.shape
    places = [0] * len(rows) if height == 1 else rows
    columns = range(1) if width == 1 else span
    held = np.empty((*lead, len(rows), len(columns)), dtype=term.dtype)
    for number, index in enumerate(np.ndindex(*lead)):
        for place, row in enumerate(places):
            start = term.offset + (number * height + row) * width * term.dtype.itemsize
            read_rows(replace(term, offset=start, shape=(width,)), 0, [columns], held[(*index, place)])
    return held.astype(np.float64)


def _spans(question: Question, q: Array) -> Iterator[range]:
    """The keys, in blocks of bounded size."""
    keys = question.k.shape[question.axis]
    per_key = 8 * q.shape[0] * q.shape[1] * max(4 * q.shape[2], 2 * question.k.shape[3], 2 * question.v.shape[3])
    step = max(1, _BYTES // max(1, per_key))
    for first in range(0, keys, step):
        yield range(first, min(first + step, keys))


def _read(stored: Stored, axis: int, rows: Sequence[int], dtype: str | None = None) -> Array:
    """These rows as [B, H, R, ...] in float64, after rounding to ``dtype``."""
    runs = [rows] if isinstance(rows, range) else [range(row, row + 1) for row in rows]
    shape = (*stored.shape[:axis], len(rows), *stored.shape[axis + 1 :])
    held = np.empty(shape, dtype=stored.dtype if dtype is None else dtype_of(dtype))
    read_rows(stored, axis, runs, held)
    wide = held.astype(np.float64)
    return wide.swapaxes(1, 2) if axis == 1 else wide


def _heads(stored: Stored, axis: int) -> int:
    return stored.shape[3 - axis]


def _error(came: Array, due: Array, scale: Array) -> float:
    """The largest difference in units of ``scale``; what is not finite must be so in both."""
    both = np.isfinite(came) & np.isfinite(due)
    if np.any(np.isfinite(came) != np.isfinite(due)) or np.any(np.isneginf(came) != np.isneginf(due)):
        return math.inf
    with np.errstate(invalid="ignore"):
        difference = np.where(both, np.abs(came - due) / np.where(np.isfinite(scale), scale, 1.0), 0.0)
    return float(difference.max(initial=0.0))
