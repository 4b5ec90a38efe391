"""Inside kernels in Triton: which weights dropout takes away, by the words of `ringcore.dropout`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def words_of_rows(seed, batch, head, first_row, step, row) -> Any:  # type: ignore[no-untyped-def]
    """The words of a block of rows, which are at these places of the tile; batch and head count in the whole call."""
    state = _placed(_placed(seed.to(tl.uint32), batch), head)
    return _finished(_placed(state, first_row + row.to(tl.int64) * step))


@triton.jit  # type: ignore[untyped-decorator]
def words_of_keys(first_key, step, key) -> Any:  # type: ignore[no-untyped-def]
    """The words of a block of keys."""
    place = first_key + key.to(tl.int64) * step
    return _placed((place * 0).to(tl.uint32), place)


@triton.jit  # type: ignore[untyped-decorator]
def kept(of_row, of_key, least) -> Any:  # type: ignore[no-untyped-def]
    """Which weights of the words [M, 1] and [1, N] stay: those that draw ``least`` or more."""
    drawn = (_finished(of_row + of_key) ^ (of_row * 0x9E3779B1)) * 0xC2B2AE35
    return (drawn ^ (drawn >> 16)) >= least.to(tl.uint32)


@triton.jit  # type: ignore[untyped-decorator]
def _placed(state, place) -> Any:  # type: ignore[no-untyped-def]
    """The state after both words of a place."""
    place = place.to(tl.int64)
    return _absorbed(_absorbed(state, place.to(tl.uint32)), (place >> 32).to(tl.uint32))


@triton.jit  # type: ignore[untyped-decorator]
def _absorbed(state, word) -> Any:  # type: ignore[no-untyped-def]
    word = word * 0xCC9E2D51
    state = state ^ (((word << 15) | (word >> 17)) * 0x1B873593)
    return ((state << 13) | (state >> 19)) * 5 + 0xE6546B64


@triton.jit  # type: ignore[untyped-decorator]
def _finished(x) -> Any:  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
