"""Dense attention in float64, written from the definition: one softmax over one full score matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Truth:
    """What a call must give, and the scales that its errors are measured against."""

    out: np.ndarray
    lse: np.ndarray
    gradients: dict[str, np.ndarray]
    largest_logit: float
    row_scale: np.ndarray  # the largest |v| that each row sees, [B, H, S, 1]


def visible_pairs(queries: int, keys: int, batch: int, keywords: dict[str, Any]) -> np.ndarray:
    """[B, S, N]: which positions see which, by comparing every pair of positions."""
    offset = keywords.get("query_offset", 0)
    offsets = np.broadcast_to(np.asarray(offset), (batch,))
    limits = np.asarray(keywords.get("key_lengths") or [keys] * batch)
    row = np.arange(queries)[None, :, None] + offsets[:, None, None]
    column = np.arange(keys)[None, None, :]
    seen = np.broadcast_to(column < limits[:, None, None], (batch, queries, keys)).copy()
    window = keywords.get("window")
    if isinstance(window, int):
        window = (window - 1, 0)
    left, right = window or (None, None)
    if keywords.get("causal"):
        seen &= column <= row
    if left is not None:
        seen &= row - column <= left
    if right is not None:
        seen &= column - row <= right
    documents = keywords.get("documents")
    if keywords.get("cu_seqlens") is not None:
        documents = np.concatenate([[n] * length for n, length in enumerate(np.diff(keywords["cu_seqlens"]))])
    if documents is not None:
        of_keys = np.broadcast_to(documents, (batch, keys))
        of_rows = np.stack([ids[offset : offset + queries] for ids, offset in zip(of_keys, offsets, strict=True)])
        seen &= of_rows[:, :, None] == of_keys[:, None, :]
    return seen


def _product(x, factor):
    return x * np.uint32(factor)


def _mixed(state, number):
    """MurmurHash3's state after the low and the high word of a number, in unsigned words that overflow."""
    for word in (number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF):
        word = _product(word.astype(np.uint32), 0xCC9E2D51)
        word = _product((word << np.uint32(15)) | (word >> np.uint32(17)), 0x1B873593)
        state = state ^ word
        state = _product((state << np.uint32(13)) | (state >> np.uint32(19)), 5) + np.uint32(0xE6546B64)
    return state


def _finalised(x):
    x = _product(x ^ (x >> np.uint32(16)), 0x85EBCA6B)
    x = _product(x ^ (x >> np.uint32(13)), 0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def kept_pairs(rate, seed, batch, heads, rows, columns) -> np.ndarray:
    """[B, H, S, T]: what dropout multiplies weights with, of queries at positions ``rows`` [B, S]."""
    axes = np.arange(batch)[:, None, None, None], np.arange(heads)[:, None, None], rows[:, None, :, None]
    with np.errstate(over="ignore"):
        state = _mixed(np.zeros((1, 1, 1, 1), np.uint32), np.full((1, 1, 1, 1), seed))
        for number in axes:
            state = _mixed(state, number.astype(np.int64))
        of_row, of_key = _finalised(state), _mixed(np.zeros(len(columns), np.uint32), np.asarray(columns, np.int64))
        drawn = _product(_finalised(of_row + of_key) ^ _product(of_row, 0x9E3779B1), 0xC2B2AE35)
        drawn ^= drawn >> np.uint32(16)
    return np.where(drawn.astype(float) < round(rate * 2**32), 0.0, 1 / (1 - rate))


def multiplicity(heads: int, length: int, keywords: dict[str, Any]) -> np.ndarray:
    """[H, N, N]: how many branches of dilated attention show a pair, by looking at every pair."""
    head, i, j = np.arange(heads)[:, None, None], np.arange(length)[:, None], np.arange(length)
    found = np.zeros((heads, length, length))
    for w, r in zip(keywords["segment_lengths"], keywords["dilation_rates"], strict=True):
        offset = head % r if keywords.get("head_offset", "modulo") == "modulo" else head // -(-heads // r)
        found += (i // w == j // w) & ((i % w) % r == offset) & ((j % w) % r == offset)
    return found


def dense(q, k, v, keywords: dict[str, Any], dout, dlse) -> Truth:
    """The truth for arrays [B, H, S, D] of any float dtype, as they are after rounding to it."""
    keys = k.shape[2]
    first, _ = keywords.get("prefix", (k[:, :, :0], None))
    before = first.shape[2]
    if before:  # keys and values more, which all see and no term knows
        k, v = (np.concatenate(pair, axis=2) for pair in zip(keywords["prefix"], (k, v), strict=True))
    q, k, v, dout, dlse = (np.asarray(x).astype(np.float64) for x in (q, k, v, dout, dlse))
    group = q.shape[1] // k.shape[1]
    k_full, v_full = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = keywords.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    raw = np.einsum("bhsd,bhtd->bhst", q, k_full) * scale
    cap = keywords.get("softcap")
    scores = raw.copy() if cap is None else cap * np.tanh(raw / cap)
    slope = np.ones_like(raw) if cap is None else 1 / np.cosh(raw / cap) ** 2
    bias = keywords.get("bias")
    if bias is not None:
        scores[..., before:] += np.asarray(bias).astype(np.float64)
    if keywords.get("alibi") is not None:
        offsets = np.broadcast_to(keywords.get("query_offset", 0), (q.shape[0],))
        rows = np.arange(q.shape[2])[None, :] + offsets[:, None]
        distance = np.abs(rows[:, None, :, None] - np.arange(keys))
        scores[..., before:] -= np.asarray(keywords["alibi"]).astype(float)[:, None, None] * distance
    seen = np.ones(raw.shape, bool)
    seen[..., before:] = visible_pairs(q.shape[2], keys, q.shape[0], keywords)[:, None]
    mask = keywords.get("mask")
    if callable(mask):
        rows = np.arange(q.shape[2]) + keywords.get("query_offset", 0)
        mask = mask(rows[:, None], np.arange(keys)[None, :])
    if mask is not None:
        seen[..., before:] &= np.asarray(mask)
    if "segment_lengths" in keywords:
        with np.errstate(divide="ignore"):
            scores += np.log(multiplicity(q.shape[1], keys, keywords))
    seen = seen & ~np.isneginf(scores)
    scores = np.where(seen, scores, -np.inf)
    # A sink is one more key, which all of its head see, and whose value is 0.
    sinks = np.full(q.shape[1], -np.inf) if keywords.get("sinks") is None else np.asarray(keywords["sinks"], float)
    sink = np.broadcast_to(sinks[:, None, None], (*raw.shape[:3], 1))
    scores = np.concatenate([scores, sink], axis=-1)
    seen = np.concatenate([seen, sink > -np.inf], axis=-1)
    v_full = np.concatenate([v_full, np.zeros_like(v_full, shape=(*v_full.shape[:2], 1, v_full.shape[3]))], axis=2)
    some = seen.any(-1, keepdims=True)
    top = np.max(np.where(some, scores, 0.0), axis=-1, keepdims=True)
    power = np.where(seen, np.exp(np.where(seen, scores - top, -np.inf)), 0.0)
    total = power.sum(-1, keepdims=True)
    weights = power / np.where(some, total, 1.0)
    factor = np.ones(())
    if keywords.get("dropout"):
        rows = np.arange(q.shape[2])[None] + np.broadcast_to(keywords.get("query_offset", 0), (q.shape[0],))[:, None]
        columns = [*range(-before, 0), *range(keys)]
        factor = kept_pairs(keywords["dropout"], keywords["dropout_seed"], *q.shape[:2], rows, columns)
        factor = np.concatenate([factor, np.ones_like(factor[..., :1])], axis=-1)  # the sink's
    out = (weights * factor) @ v_full
    lse = np.where(some, top + np.log(np.where(some, total, 1.0)), -np.inf)[..., 0]

    # Gradients by the chain rule through the full softmax matrix.
    dweights = factor * (dout @ np.swapaxes(v_full, -1, -2))
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True) + dlse[..., None])
    dsinks = dscores[..., -1].sum((0, 2))
    weights, dscores, seen, v_full = (weights * factor)[..., :-1], dscores[..., :-1], seen[..., :-1], v_full[:, :, :-1]
    draw = np.where(seen, dscores * slope * scale, 0.0)
    fold = (q.shape[0], k.shape[1], group)
    gradients: dict[str, np.ndarray] = {
        "q": draw @ k_full,
        "k": (np.swapaxes(draw, -1, -2) @ q).reshape(*fold, *k.shape[2:]).sum(2),
        "v": (np.swapaxes(weights, -1, -2) @ dout).reshape(*fold, *v.shape[2:]).sum(2),
    }
    for name in ("k", "v"):
        gradients[f"prefix_{name}"], gradients[name] = np.split(gradients[name], [before], axis=2)
    if keywords.get("sinks") is not None:
        gradients["sinks"] = dsinks
    dscores = dscores[..., before:]
    if bias is not None:
        shape = np.shape(bias)
        padded = (1,) * (4 - len(shape)) + shape
        axes = tuple(i for i in range(4) if padded[i] == 1)
        gradients["bias"] = dscores.sum(axes, keepdims=True).reshape(shape) if axes else dscores.reshape(shape)
    largest = float(np.abs(np.where(seen, raw, 0.0)).max(initial=0.0))
    row_scale = (seen * np.abs(v_full).max(-1)[:, :, None, :]).max(-1, keepdims=True, initial=0.0)
    return Truth(out, lse, gradients, largest, row_scale)
