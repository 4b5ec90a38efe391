"""What keywords mean, by their definitions: every pair of positions is looked at."""

from __future__ import annotations

from typing import Any

import numpy as np

from ringcore.testing.problem import Bools, Floats, Problem
from ringcore.testing.table import Array, Keywords


def problem_of(arrays: dict[str, Array], keywords: Keywords) -> Problem:
    """The problem that a call poses: arrays q, k, v, dout, dlse of any float dtype, as rounded to it."""
    prefix = keywords.get("prefix")
    before = 0 if prefix is None else prefix[0].shape[2]
    q, k, v, dout, dlse = (arrays[name].astype(np.float64) for name in ("q", "k", "v", "dout", "dlse"))
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    kept: Floats | float = 1.0
    if before:  # keys and values more, which all see and no term knows
        k, v = (np.concatenate([x.astype(np.float64), y], axis=2) for x, y in zip(prefix or (), (k, v), strict=True))
    if keywords.get("dropout"):
        rows = np.arange(queries)[None] + _offsets(batch, keywords)[:, None]
        columns = [*range(-before, 0), *range(keys)]
        kept = kept_pairs(keywords["dropout"], keywords["dropout_seed"], batch, heads, rows, columns)
    scale, sinks = keywords.get("scale"), keywords.get("sinks")
    return Problem(
        q, k, v, dout,
        scale=width**-0.5 if scale is None else scale, shown=shown_pairs(batch, queries, keys, keywords),
        added=_added(batch, heads, queries, keys, keywords), before=before, window=_sides(keywords),
        dilation=tuple(zip(keywords.get("segment_lengths", ()), keywords.get("dilation_rates", ()), strict=True)),
        softcap=keywords.get("softcap"), sinks=None if sinks is None else np.asarray(sinks).astype(np.float64),
        kept=kept, dlse=dlse[..., None],
    )  # fmt: skip


def _offsets(batch: int, keywords: Keywords) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.broadcast_to(np.asarray(keywords.get("query_offset", 0)), (batch,))


def _sides(keywords: Keywords) -> tuple[int | None, int | None] | None:
    """A window's reach to the left and to the right; a number counts the query itself."""
    window = keywords.get("window")
    return (window - 1, 0) if isinstance(window, int) else window


def _added(batch: int, heads: int, queries: int, keys: int, keywords: Keywords) -> dict[str, Floats]:
    """By keyword, [B, H, S, N]: bias, ALiBi and the logarithm of how often dilated attention counts a pair."""
    added: dict[str, Floats] = {}
    if keywords.get("bias") is not None:
        added["bias"] = np.asarray(keywords["bias"]).astype(np.float64)
    if keywords.get("alibi") is not None:
        rows = np.arange(queries)[None, :] + _offsets(batch, keywords)[:, None]
        distance = np.abs(rows[:, None, :, None] - np.arange(keys))
        added["alibi"] = -np.asarray(keywords["alibi"]).astype(np.float64)[:, None, None] * distance
    if "segment_lengths" in keywords:
        added["dilated"] = counted(heads, keys, keywords)
    return {name: np.broadcast_to(x, (batch, heads, queries, keys)) for name, x in added.items()}


def shown_pairs(batch: int, queries: int, keys: int, keywords: Keywords) -> dict[str, Bools]:
    """By keyword, [B or 1, H or 1, S, N]: which positions see which."""
    offsets, shown = _offsets(batch, keywords), dict[str, Bools]()
    row, column = np.arange(queries)[None, :, None] + offsets[:, None, None], np.arange(keys)[None, None, :]
    if keywords.get("key_lengths") is not None:
        shown["key_lengths"] = np.asarray(column < np.asarray(keywords["key_lengths"])[:, None, None])
    if keywords.get("causal"):
        shown["causal"] = np.asarray(column <= row)
    sides = _sides(keywords)
    if sides is not None:
        left, right = (np.inf if side is None else side for side in sides)
        shown["window"] = np.asarray((row - column <= left) & (column - row <= right))
    documents = keywords.get("documents")
    if keywords.get("cu_seqlens") is not None:
        documents = np.concatenate([[n] * length for n, length in enumerate(np.diff(keywords["cu_seqlens"]))])
    if documents is not None:
        of_keys = np.broadcast_to(documents, (batch, keys))
        of_rows = np.stack([ids[offset : offset + queries] for ids, offset in zip(of_keys, offsets, strict=True)])
        shown["documents"] = np.asarray(of_rows[:, :, None] == of_keys[:, None, :])
    shown = {name: each[:, None] for name, each in shown.items()}
    mask = keywords.get("mask")
    if callable(mask):
        rows = np.arange(queries) + keywords.get("query_offset", 0)
        mask = mask(rows[:, None], np.arange(keys)[None, :])
    if mask is not None:
        shown["mask"] = np.asarray(mask)
    return shown


def counted(heads: int, length: int, keywords: Keywords) -> Floats:
    """[H, N, N]: the logarithm of how many branches of dilated attention show a pair."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.sum(branches(heads, length, keywords), axis=0)))


def branches(heads: int, length: int, keywords: Keywords) -> list[Bools]:
    """Of each branch of dilated attention [H, N, N]: which pairs it shows, by looking at every pair."""
    head, i, j = np.arange(heads)[:, None, None], np.arange(length)[:, None], np.arange(length)
    found = []
    for w, r in zip(keywords["segment_lengths"], keywords["dilation_rates"], strict=True):
        offset = head % r if keywords.get("head_offset", "modulo") == "modulo" else head // -(-heads // r)
        found.append((i // w == j // w) & ((i % w) % r == offset) & ((j % w) % r == offset))
    return found


def kept_pairs(rate: float, seed: int, batch: int, heads: int, rows: Any, columns: Any) -> Floats:
    """[B, H, S, T]: what dropout multiplies weights with, of queries at positions ``rows`` [B, S].

    A pair is dropped where MurmurHash3 of its numbers, in unsigned words that overflow, is below the rate's share.
    """
    axes = np.arange(batch)[:, None, None, None], np.arange(heads)[:, None, None], rows[:, None, :, None]
    with np.errstate(over="ignore"):
        state = _mixed(np.zeros((1, 1, 1, 1), np.uint32), np.full((1, 1, 1, 1), seed))
        for number in axes:
            state = _mixed(state, number.astype(np.int64))
        of_row, of_key = _finalised(state), _mixed(np.zeros(len(columns), np.uint32), np.asarray(columns, np.int64))
        drawn = _product(_finalised(of_row + of_key) ^ _product(of_row, 0x9E3779B1), 0xC2B2AE35)
        drawn ^= drawn >> np.uint32(16)
    return np.where(drawn.astype(float) < round(rate * 2**32), 0.0, 1 / (1 - rate))


def _product(x: Any, factor: int) -> Any:
    return x * np.uint32(factor)


def _mixed(state: Any, number: Any) -> Any:
    """The hash's state after the low and the high word of a number."""
    for word in (number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF):
        word = _product(word.astype(np.uint32), 0xCC9E2D51)
        word = _product((word << np.uint32(15)) | (word >> np.uint32(17)), 0x1B873593)
        state = state ^ word
        state = _product((state << np.uint32(13)) | (state >> np.uint32(19)), 5) + np.uint32(0xE6546B64)
    return state


def _finalised(x: Any) -> Any:
    x = _product(x ^ (x >> np.uint32(16)), 0x85EBCA6B)
    x = _product(x ^ (x >> np.uint32(13)), 0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
