"""Attention over one tile in Triton, forward: bias and mask are read as they are, in blocks, broadcast by strides."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ringcore_torch.triton_dropout import kept, words_of_keys, words_of_rows
from ringcore_torch.triton_scores import capped, columns_of, place, visible

# They change with every tile, which must not compile anything anew.
RUNTIME = [
    "rows", "keys", "lo", "hi", "seed", "least", "first_batch", "first_head", "head_step", "first_row", "row_step",
    "first_key", "key_step",
]  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)  # type: ignore[untyped-decorator]
def forward(  # type: ignore[no-untyped-def]
    q, k, v, bias, mask, maximum, total, weighted,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, bb, bh, bs, bt, mb, mh, ms, mt, wb, wh, ws,
    heads, group, rows, keys, lo, hi, scale, softcap, width, values,
    seed, least, kept_scale, first_batch, first_head, head_step, first_row, row_step, first_key, key_step,
    banded: tl.constexpr, biased: tl.constexpr, masked: tl.constexpr, soft: tl.constexpr, drops: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr, wide_values: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr,
) -> Any:  # fmt: skip
    """One block of rows: weighted [B, H, S, E], maximum and total [B, H, S] in float32."""
    batch, head, block = place(tl.cdiv(rows, block_rows), heads)
    row, column = block * block_rows + tl.arange(0, block_rows), tl.arange(0, block_keys)
    d, e = tl.arange(0, wide), tl.arange(0, wide_values)
    q += batch * qb + head * qh
    k += batch * kb + head // group * kh
    v += batch * vb + head // group * vh
    bias += batch * bb + head * bh
    mask += batch * mb + head * mh
    here = row < rows
    mine = tl.load(q + row.to(tl.int64)[:, None] * qs + d[None, :], here[:, None] & (d < width)[None, :], 0.0)
    top = tl.full((block_rows,), float("-inf"), tl.float32)
    sums = tl.zeros((block_rows,), tl.float32)
    found = tl.zeros((block_rows, wide_values), tl.float32)
    if drops:
        of_row = words_of_rows(seed, first_batch + batch, first_head + head * head_step, first_row, row_step, row)[
            :, None
        ]
    first, last = columns_of(block * block_rows, block_rows, rows, keys, lo, hi)
    for start in range(first // block_keys * block_keys, last, block_keys):
        key = start + column
        there = (key >= first) & (key < last)
        place_of_key = key.to(tl.int64)
        theirs = tl.load(k + d[:, None] + place_of_key[None, :] * ks, there[None, :] & (d < width)[:, None], 0.0)
        score = tl.dot(mine, theirs, input_precision=precision) * scale
        if soft:
            score, _ = capped(score, softcap)
        seen, added = visible(
            row[:, None], key[None, :], here[:, None] & there[None, :], lo, hi, bias, bs, bt, mask, ms, mt,
            banded, biased, masked,
        )  # fmt: skip
        score = tl.where(seen, score + added, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        reference = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp(score - reference[:, None])
        old = tl.exp(top - reference)
        sums = sums * old + tl.sum(weights, 1)
        if drops:
            stays = kept(of_row, words_of_keys(first_key, key_step, key)[None, :], least)
            weights = tl.where(stays, weights * kept_scale, 0.0)
        given = tl.load(v + place_of_key[:, None] * vs + e[None, :], there[:, None] & (e < values)[None, :], 0.0)
        found = tl.dot(weights.to(given.dtype), given, found * old[:, None], input_precision=precision)
        top = new
    at = (batch * heads + head) * rows + row
    # The largest of NaN alone is -inf here, which would say that the row saw no key.
    tl.store(maximum + at, tl.where(sums == sums, top, float("nan")), here)
    tl.store(total + at, sums, here)
    weighted += batch * wb + head * wh
    tl.store(weighted + row.to(tl.int64)[:, None] * ws + e[None, :], found, here[:, None] & (e < values)[None, :])


@triton.jit(do_not_specialize=RUNTIME[:4])  # type: ignore[untyped-decorator]
def seen_keys(  # type: ignore[no-untyped-def]
    bias, mask, shown, bb, bh, bs, bt, mb, mh, ms, mt, heads, rows, keys, lo, hi,
    banded: tl.constexpr, biased: tl.constexpr, masked: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr,
) -> Any:  # fmt: skip
    """Which of a block of keys some row sees: shown [B, H, T], bytes that are 0 or 1."""
    batch, head, block = place(tl.cdiv(keys, block_keys), heads)
    key, row = block * block_keys + tl.arange(0, block_keys), tl.arange(0, block_rows)
    bias += batch * bb + head * bh
    mask += batch * mb + head * mh
    some = tl.zeros((block_rows, block_keys), tl.int8)
    for start in range(0, rows, block_rows):
        inside = (start + row < rows)[:, None] & (key < keys)[None, :]
        seen, _ = visible(
            start + row[:, None], key[None, :], inside, lo, hi, bias, bs, bt, mask, ms, mt, banded, biased, masked
        )
        some = some | seen.to(tl.int8)
    tl.store(shown + (batch * heads + head) * keys + key, tl.max(some, 0), key < keys)
