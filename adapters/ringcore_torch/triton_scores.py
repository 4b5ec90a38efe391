"""Inside kernels in Triton: which program computes what, and the scores of a block with all that is done to them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_SMALL = tl.constexpr(0.25)  # below it a series is closer to tanh than its definition in float32


@triton.jit  # type: ignore[untyped-decorator]
def place(blocks, heads) -> Any:  # type: ignore[no-untyped-def]
    """This program's batch entry, head and block."""
    number = tl.program_id(0)
    pair = (number // blocks).to(tl.int64)
    return pair // heads, pair % heads, number % blocks


@triton.jit  # type: ignore[untyped-decorator]
def columns_of(row, block: tl.constexpr, rows, keys, lo, hi) -> Any:  # type: ignore[no-untyped-def]
    """The half-open range of keys that some of ``block`` rows from ``row`` on may see."""
    last = tl.minimum(row + block, rows) - 1
    return tl.maximum(row + lo, 0), tl.minimum(last + hi + 1, keys)


@triton.jit  # type: ignore[untyped-decorator]
def rows_of(key, block: tl.constexpr, rows, keys, lo, hi) -> Any:  # type: ignore[no-untyped-def]
    """The half-open range of rows that may see some of ``block`` keys from ``key`` on."""
    last = tl.minimum(key + block, keys) - 1
    return tl.maximum(key - hi, 0), tl.minimum(last - lo + 1, rows)


@triton.jit  # type: ignore[untyped-decorator]
def visible(  # type: ignore[no-untyped-def]
    row, column, inside, lo, hi, bias, bs, bt, mask, ms, mt,
    banded: tl.constexpr, biased: tl.constexpr, masked: tl.constexpr,
) -> Any:  # fmt: skip
    """Which pairs of row [M, 1] and column [1, N] see each other, and what is added to their scores."""
    seen = inside
    added = tl.zeros(inside.shape, tl.float32)
    if banded:
        seen = seen & (column - row >= lo) & (column - row <= hi)
    if masked:
        seen = seen & (tl.load(mask + row.to(tl.int64) * ms + column.to(tl.int64) * mt, inside, 0) != 0)
    if biased:
        added = tl.load(bias + row.to(tl.int64) * bs + column.to(tl.int64) * bt, inside, 0.0).to(tl.float32)
        seen = seen & (added != float("-inf"))
    return seen, added


@triton.jit  # type: ignore[untyped-decorator]
def capped(score, cap) -> Any:  # type: ignore[no-untyped-def]
    """cap * tanh(score / cap), and tanh(score / cap)."""
    x = score / cap
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    bounded = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    bounded = tl.where(x < 0.0, -bounded, bounded)
    inner = tl.where(tl.abs(x) < _SMALL, series, bounded)
    return inner * cap, inner
