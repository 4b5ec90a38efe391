"""Many partials of one call, or parts of one gradient, brought together on a GPU in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_ROWS = 16  # that one program makes
_COLUMNS = 128  # of a row that a program holds at a time
_MOST = 8  # parts of one head
_UNIT = 16  # numbers come in this unit, for Triton compiles anew for 1, for multiples of 16 and for others

Tensor = torch.Tensor


class Part(NamedTuple):
    """What is known of some heads and rows of the result: values [B, h, s, E], and lse [B, h, s] unless they add up."""

    heads: range
    rows: range
    values: Tensor
    lse: Tensor | None


def fits(parts: Sequence[Part], heads: int) -> bool:
    """Whether no head has more parts than one pass takes."""
    return all(sum(head in part.heads for part in parts) <= _MOST for head in range(heads))


def merged(out: Tensor, lse: Tensor, parts: Sequence[Part]) -> None:
    """Write out [B, H, S, E] and lse [B, H, S] over all keys of the parts: 0 and -inf in rows that none saw."""
    _over_heads(out, lse, parts)


def summed(out: Tensor, parts: Sequence[Part]) -> None:
    """Write the sum of the parts [B, H, S, E]."""
    _over_heads(out, None, parts)


def _over_heads(out: Tensor, lse: Tensor | None, parts: Sequence[Part]) -> None:
    batch, heads, rows, width = out.shape
    blocks = triton.cdiv(rows, _ROWS)
    columns = int(min(_COLUMNS, triton.next_power_of_2(width)))
    for head in range(heads if out.numel() else 0):
        mine = [part for part in parts if head in part.heads]
        values = tuple(part.values[:, part.heads.index(head)] for part in mine)
        own = out[:, head] if lse is None else lse[:, head]
        known = tuple(own if part.lse is None else part.lse[:, part.heads.index(head)] for part in mine)
        _together[(blocks * batch,)](
            out[:, head], own, values, known,
            tuple(part.rows.start * _UNIT for part in mine), tuple(part.rows.step * _UNIT for part in mine),
            tuple(len(part.rows) * _UNIT for part in mine),
            tuple(x.stride(0) for x in values), tuple(x.stride(1) for x in values),
            tuple(x.stride(0) for x in known), tuple(x.stride(1) for x in known),
            blocks, rows, width, out.stride(0), out.stride(2), own.stride(0), own.stride(1),
            weighs=lse is not None, count=len(mine), block=_ROWS, columns=columns, unit=_UNIT,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _row_of(row, first, step, count, unit: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """Which row of a part holds these rows, and whether it does."""
    first, step = first // unit, step // unit
    place = (row - first) // step
    return place, (row >= first) & (place * step + first == row) & (place < count // unit)


@triton.jit  # type: ignore[untyped-decorator]
def _together(  # type: ignore[no-untyped-def]
    out, lse, values, known, firsts, steps, counts, value_batches, value_rows, known_batches, known_rows,
    blocks, rows, width, ob, os, lb, ls,
    weighs: tl.constexpr, count: tl.constexpr, block: tl.constexpr, columns: tl.constexpr, unit: tl.constexpr,
) -> Any:  # fmt: skip
    number = tl.program_id(0)
    batch = (number // blocks).to(tl.int64)
    row = (number % blocks).to(tl.int64) * block + tl.arange(0, block)
    inside = row < rows
    largest = tl.full((block,), float("-inf"), tl.float32)
    sums = tl.zeros((block,), tl.float32)
    if weighs:
        for n in tl.static_range(count):
            place, here = _row_of(row, firsts[n], steps[n], counts[n], unit)
            score = known[n] + batch * known_batches[n] + place * known_rows[n]
            largest = tl.maximum(largest, tl.load(score, inside & here, float("-inf")))
        reference = tl.where(largest == float("-inf"), 0.0, largest)
        for n in tl.static_range(count):
            place, here = _row_of(row, firsts[n], steps[n], counts[n], unit)
            score = known[n] + batch * known_batches[n] + place * known_rows[n]
            sums += tl.exp(tl.load(score, inside & here, float("-inf")) - reference)
        unseen = sums == 0.0
        sums = tl.where(unseen, 1.0, sums)
        final = tl.where(unseen, float("-inf"), reference + tl.log(sums))
        tl.store(lse + batch * lb + row * ls, final, inside)
    for start in range(0, width, columns):
        column = start + tl.arange(0, columns)[None, :]
        total = tl.zeros((block, columns), tl.float32)
        for n in tl.static_range(count):
            at, shown = _row_of(row, firsts[n], steps[n], counts[n], unit)
            shown = inside & shown
            weight = tl.full((block,), 1.0, tl.float32)
            if weighs:
                seen = tl.load(known[n] + batch * known_batches[n] + at * known_rows[n], shown, float("-inf"))
                # What stands under a row that saw no key is never read into a sum: it may be NaN.
                shown = shown & (seen != float("-inf"))
                weight = tl.exp(seen - reference) / sums
            value = values[n] + batch * value_batches[n] + at[:, None] * value_rows[n] + column
            mine = tl.load(value, shown[:, None] & (column < width), 0.0).to(tl.float32)
            total += mine * weight[:, None]
        into = out + batch * ob + row[:, None] * os + column
        tl.store(into, total.to(out.dtype.element_ty), inside[:, None] & (column < width))
