"""Attention over one tile in Triton, backward: the weights are made again from the finished rows' statistics.

Each array of gradients has a kernel whose programs own disjoint parts of it, so that every run gives the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ringcore_torch.triton_dropout import kept, words_of_keys, words_of_rows
from ringcore_torch.triton_forward import RUNTIME
from ringcore_torch.triton_scores import capped, columns_of, place, rows_of, visible


@triton.jit  # type: ignore[untyped-decorator]
def _score_gradient(  # type: ignore[no-untyped-def]
    q, k, v, dout, top, inverse, delta, seen, added, scale, softcap, of_row, of_key, least, kept_scale,
    soft: tl.constexpr, drops: tl.constexpr, precision: tl.constexpr,
) -> Any:  # fmt: skip
    """The weights of rows q [M, D] and keys k [N, D] that dropout left, the scores' gradient, that before the soft cap.

    of_row, of_key: the words of dropout.
    """
    score = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    slope = 1.0
    if soft:
        score, inner = capped(score, softcap)
        slope = 1.0 - inner * inner
    score = tl.where(seen, score + added, float("-inf"))
    weights = tl.exp(score - top[:, None]) * inverse[:, None]
    given = tl.dot(dout, tl.trans(v), input_precision=precision)
    used = weights
    if drops:
        stays = kept(of_row[:, None], of_key[None, :], least)
        given = tl.where(stays, given * kept_scale, 0.0)
        used = tl.where(stays, weights * kept_scale, 0.0)
    gradient = weights * (given - delta[:, None])
    gradient = tl.where(seen, gradient, 0.0)
    return used, gradient, tl.where(seen, gradient * slope, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(maximum, total, at, here) -> Any:  # type: ignore[no-untyped-def]
    """maximum, 1 / total and which rows saw a key: the others have no weights, whatever their q holds."""
    top, sums = tl.load(maximum + at, here, float("-inf")), tl.load(total + at, here, 0.0)
    here = here & (top != float("-inf")) & (sums != 0.0)
    return tl.where(here, top, 0.0), 1.0 / tl.where(here, sums, 1.0), here


@triton.jit(do_not_specialize=RUNTIME)  # type: ignore[untyped-decorator]
def query_gradient(  # type: ignore[no-untyped-def]
    q, k, v, bias, mask, maximum, total, dlse, delta, dout, out, dq,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, bb, bh, bs, bt, mb, mh, ms, mt, ob, oh, os, fb, fh, fs, gb, gh, gs,
    heads, group, rows, keys, lo, hi, scale, softcap, width, values,
    seed, least, kept_scale, first_batch, first_head, head_step, first_row, row_step, first_key, key_step,
    banded: tl.constexpr, biased: tl.constexpr, masked: tl.constexpr, soft: tl.constexpr, drops: tl.constexpr,
    precision: tl.constexpr, with_dlse: tl.constexpr, wide: tl.constexpr, wide_values: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr,
) -> Any:  # fmt: skip
    """One block of rows of dq [B, H, S, D], and of delta [B, H, S], which the other kernels read."""
    batch, head, block = place(tl.cdiv(rows, block_rows), heads)
    row, column = block * block_rows + tl.arange(0, block_rows), tl.arange(0, block_keys)
    d, e = tl.arange(0, wide), tl.arange(0, wide_values)
    k += batch * kb + head // group * kh
    v += batch * vb + head // group * vh
    bias += batch * bb + head * bh
    mask += batch * mb + head * mh
    at = (batch * heads + head) * rows + row
    top, inverse, here = _statistics(maximum, total, at, row < rows)
    r, in_width, in_values = row.to(tl.int64)[:, None], (d < width)[None, :], (e < values)[None, :]
    mine = tl.load(q + batch * qb + head * qh + r * qs + d[None, :], here[:, None] & in_width, 0.0)
    do = tl.load(dout + batch * ob + head * oh + r * os + e[None, :], here[:, None] & in_values, 0.0)
    finished = tl.load(out + batch * fb + head * fh + r * fs + e[None, :], here[:, None] & in_values, 0.0)
    difference = tl.sum(do.to(tl.float32) * finished.to(tl.float32), 1)
    if with_dlse:
        difference -= tl.load(dlse + at, here, 0.0)
    tl.store(delta + at, difference, row < rows)
    found = tl.zeros((block_rows, wide), tl.float32)
    of_row = row
    if drops:
        of_row = words_of_rows(seed, first_batch + batch, first_head + head * head_step, first_row, row_step, row)
    first, last = columns_of(block * block_rows, block_rows, rows, keys, lo, hi)
    for start in range(first // block_keys * block_keys, last, block_keys):
        key = start + column
        there = (key >= first) & (key < last)
        t = key.to(tl.int64)[:, None]
        theirs = tl.load(k + t * ks + d[None, :], there[:, None] & in_width, 0.0)
        given = tl.load(v + t * vs + e[None, :], there[:, None] & in_values, 0.0)
        seen, added = visible(
            row[:, None], key[None, :], here[:, None] & there[None, :], lo, hi, bias, bs, bt, mask, ms, mt,
            banded, biased, masked,
        )  # fmt: skip
        of_key = key
        if drops:
            of_key = words_of_keys(first_key, key_step, key)
        _, _, gradient = _score_gradient(
            mine, theirs, given, do, top, inverse, difference, seen, added, scale, softcap,
            of_row, of_key, least, kept_scale, soft, drops, precision,
        )  # fmt: skip
        found = tl.dot(gradient.to(theirs.dtype), theirs, found, input_precision=precision)
    tl.store(dq + batch * gb + head * gh + r * gs + d[None, :], found * scale, (row < rows)[:, None] & in_width)


@triton.jit(do_not_specialize=RUNTIME)  # type: ignore[untyped-decorator]
def key_gradients(  # type: ignore[no-untyped-def]
    q, k, v, bias, mask, maximum, total, delta, dout, dk, dv,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, bb, bh, bs, bt, mb, mh, ms, mt, ob, oh, os, gb, gh, gs, hb, hh, hs,
    heads, group, rows, keys, lo, hi, scale, softcap, width, values,
    seed, least, kept_scale, first_batch, first_head, head_step, first_row, row_step, first_key, key_step,
    banded: tl.constexpr, biased: tl.constexpr, masked: tl.constexpr, soft: tl.constexpr, drops: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr, wide_values: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr,
) -> Any:  # fmt: skip
    """One block of keys of dk [B, Hk, T, D] and dv [B, Hk, T, E], over all heads of q that read them."""
    batch, key_head, block = place(tl.cdiv(keys, block_keys), heads // group)
    key, line = block * block_keys + tl.arange(0, block_keys), tl.arange(0, block_rows)
    d, e = tl.arange(0, wide), tl.arange(0, wide_values)
    there = key < keys
    t, in_width, in_values = key.to(tl.int64)[:, None], (d < width)[None, :], (e < values)[None, :]
    theirs = tl.load(k + batch * kb + key_head * kh + t * ks + d[None, :], there[:, None] & in_width, 0.0)
    given = tl.load(v + batch * vb + key_head * vh + t * vs + e[None, :], there[:, None] & in_values, 0.0)
    found, found_values = tl.zeros((block_keys, wide), tl.float32), tl.zeros((block_keys, wide_values), tl.float32)
    of_key = key
    if drops:
        of_key = words_of_keys(first_key, key_step, key)
    first, last = rows_of(block * block_keys, block_keys, rows, keys, lo, hi)
    for head in range(key_head * group, (key_head + 1) * group):
        for start in range(first // block_rows * block_rows, last, block_rows):
            row = start + line
            at = (batch * heads + head) * rows + row
            top, inverse, here = _statistics(maximum, total, at, (row >= first) & (row < last))
            r = row.to(tl.int64)[:, None]
            mine = tl.load(q + batch * qb + head * qh + r * qs + d[None, :], here[:, None] & in_width, 0.0)
            do = tl.load(dout + batch * ob + head * oh + r * os + e[None, :], here[:, None] & in_values, 0.0)
            difference = tl.load(delta + at, here, 0.0)
            seen, added = visible(
                row[:, None], key[None, :], here[:, None] & there[None, :], lo, hi,
                bias + batch * bb + head * bh, bs, bt, mask + batch * mb + head * mh, ms, mt, banded, biased, masked,
            )  # fmt: skip
            of_row = row
            if drops:
                of_row = words_of_rows(
                    seed, first_batch + batch, first_head + head * head_step, first_row, row_step, row
                )
            weights, _, gradient = _score_gradient(
                mine, theirs, given, do, top, inverse, difference, seen, added, scale, softcap,
                of_row, of_key, least, kept_scale, soft, drops, precision,
            )  # fmt: skip
            found_values = tl.dot(tl.trans(weights.to(do.dtype)), do, found_values, input_precision=precision)
            found = tl.dot(tl.trans(gradient.to(mine.dtype)), mine, found, input_precision=precision)
    tl.store(dk + batch * gb + key_head * gh + t * gs + d[None, :], found * scale, there[:, None] & in_width)
    tl.store(dv + batch * hb + key_head * hh + t * hs + e[None, :], found_values, there[:, None] & in_values)


@triton.jit(do_not_specialize=RUNTIME)  # type: ignore[untyped-decorator]
def bias_gradient(  # type: ignore[no-untyped-def]
    q, k, v, bias, mask, maximum, total, delta, dout,
    qb, qh, qs, kb, kh, ks, vb, vh, vs, bb, bh, bs, bt, mb, mh, ms, mt, ob, oh, os,
    dbias, gb, gh, gs, gt, batches, heads, group, rows, keys, lo, hi, scale, softcap, width, values,
    seed, least, kept_scale, first_batch, first_head, head_step, first_row, row_step, first_key, key_step,
    batch_once: tl.constexpr, head_once: tl.constexpr, row_once: tl.constexpr, key_once: tl.constexpr,
    banded: tl.constexpr, biased: tl.constexpr, masked: tl.constexpr, soft: tl.constexpr, drops: tl.constexpr,
    precision: tl.constexpr, wide: tl.constexpr, wide_values: tl.constexpr,
    block_rows: tl.constexpr, block_keys: tl.constexpr,
) -> Any:  # fmt: skip
    """Adds to one block of dbias the gradients of all scores that the bias was added to; "once": its axis is 1."""
    row_blocks = 1 if row_once else tl.cdiv(rows, block_rows)
    key_blocks = 1 if key_once else tl.cdiv(keys, block_keys)
    own_batch, own_head, block = place(row_blocks * key_blocks, 1 if head_once else heads)
    top_row, left_key = block // key_blocks * block_rows, block % key_blocks * block_keys
    d, e = tl.arange(0, wide), tl.arange(0, wide_values)
    in_width, in_values = (d < width)[None, :], (e < values)[None, :]
    found = tl.zeros((block_rows, block_keys), tl.float32)
    for later_batch in range(0, batches if batch_once else 1):
        batch = own_batch + later_batch
        for later_head in range(0, heads if head_once else 1):
            head = own_head + later_head
            for row_start in range(top_row, rows if row_once else top_row + 1, block_rows):
                row = row_start + tl.arange(0, block_rows)
                at = (batch * heads + head) * rows + row
                top, inverse, here = _statistics(maximum, total, at, row < rows)
                r = row.to(tl.int64)[:, None]
                mine = tl.load(q + batch * qb + head * qh + r * qs + d[None, :], here[:, None] & in_width, 0.0)
                do = tl.load(dout + batch * ob + head * oh + r * os + e[None, :], here[:, None] & in_values, 0.0)
                difference = tl.load(delta + at, here, 0.0)
                first, last = columns_of(row_start, block_rows, rows, keys, lo, hi)
                key_start = first // block_keys * block_keys if key_once else left_key
                for start in range(key_start, last if key_once else left_key + 1, block_keys):
                    key = start + tl.arange(0, block_keys)
                    there = (key >= first) & (key < last)
                    t = key.to(tl.int64)[:, None]
                    theirs = tl.load(
                        k + batch * kb + head // group * kh + t * ks + d[None, :], there[:, None] & in_width, 0.0
                    )
                    given = tl.load(
                        v + batch * vb + head // group * vh + t * vs + e[None, :], there[:, None] & in_values, 0.0
                    )
                    seen, added = visible(
                        row[:, None], key[None, :], here[:, None] & there[None, :], lo, hi,
                        bias + batch * bb + head * bh, bs, bt, mask + batch * mb + head * mh, ms, mt,
                        banded, biased, masked,
                    )  # fmt: skip
                    of_row, of_key = row, key
                    if drops:
                        of_row = words_of_rows(
                            seed, first_batch + batch, first_head + head * head_step, first_row, row_step, row
                        )
                        of_key = words_of_keys(first_key, key_step, key)
                    _, gradient, _ = _score_gradient(
                        mine, theirs, given, do, top, inverse, difference, seen, added, scale, softcap,
                        of_row, of_key, least, kept_scale, soft, drops, precision,
                    )  # fmt: skip
                    found += gradient
    row, key = top_row + tl.arange(0, block_rows)[:, None], left_key + tl.arange(0, block_keys)[None, :]
    if row_once:
        found, row = tl.sum(found, 0)[None, :], tl.zeros((1, 1), tl.int32)
    if key_once:
        found, key = tl.sum(found, 1)[:, None], tl.zeros((1, 1), tl.int32)
    dbias += own_batch * gb + own_head * gh + row.to(tl.int64) * gs + key.to(tl.int64) * gt
    inside = (row < rows) & (key < keys)
    tl.store(dbias, tl.load(dbias, inside, 0.0) + found, inside)
