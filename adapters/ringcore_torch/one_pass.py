"""Merging, finishing and lse on a GPU, each in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_ROWS = 16  # that one program merges
_NUMBERS = 1024  # of lse that one program makes
_COLUMNS = 128  # of a row that a program holds at a time


def merge_into(state: tuple[torch.Tensor, ...], part: tuple[torch.Tensor, ...], finish: bool = False) -> None:
    """weighted [B, H, S, E], maximum and total [B, H, S] of ``part`` merged into those of ``state``, in place.

    Any strides, but for the last axis of both weighted, which has no gaps. ``part``'s weighted may be of a half type.
    finish: weighted is divided by the totals, which all are and stay 1, and may be of a half type in ``state`` too;
    maximum becomes lse.
    """
    weighted, maximum, total = state
    batch, heads, rows, width = weighted.shape
    blocks = triton.cdiv(rows, _ROWS)
    if weighted.numel():
        _merge[(blocks * heads * batch,)](
            weighted, maximum, total, *part, blocks, heads, rows, width, *_strides(*state), *_strides(*part),
            finish=finish, block=_ROWS, columns=_columns(width),
        )  # fmt: skip


def divided(weighted: torch.Tensor, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weighted / total [B, H, S, E] in ``dtype``, in the order of weighted's memory; 0 where total is 0."""
    out = torch.empty_like(weighted, dtype=dtype)
    batch, heads, rows, width = weighted.shape
    blocks = triton.cdiv(rows, _ROWS)
    if weighted.numel():
        _divide[(blocks * heads * batch,)](
            weighted, total, out, blocks, heads, rows, width, *_strides(weighted, total, out),
            block=_ROWS, columns=_columns(width),
        )  # fmt: skip
    return out


def lse_of(maximum: torch.Tensor, total: torch.Tensor, empty: float) -> torch.Tensor:
    """maximum + log(total) [B, H, S]; ``empty`` in rows that saw no key."""
    lse = torch.empty(maximum.shape, dtype=maximum.dtype, device=maximum.device)
    batch, heads, rows = maximum.shape
    blocks = triton.cdiv(rows, _NUMBERS)
    if lse.numel():
        _lse[(blocks * heads * batch,)](
            maximum, total, lse, blocks, heads, rows, *_strides(maximum, total, lse), empty=empty, block=_NUMBERS
        )
    return lse


def finished_packed(stacked: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of partials [n, B, H, S, E + 2]: weighted, maximum and total side by side, without gaps."""
    count, *rows, numbers = stacked.shape
    out = torch.empty((*rows, numbers - 2), dtype=dtype, device=stacked.device)
    lse = torch.empty(rows, dtype=torch.float32, device=stacked.device)
    if lse.numel():
        _packed[(lse.numel(),)](
            stacked, out, lse, stacked.stride(0), numbers - 2, count=count, columns=triton.next_power_of_2(numbers - 2)
        )
    return out, lse


def _columns(width: int) -> int:
    return int(min(_COLUMNS, triton.next_power_of_2(width)))


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Those of the axes batch, head and row."""
    return [step for x in tensors for step in x.stride()[:3]]


@triton.jit  # type: ignore[untyped-decorator]
def _place(blocks, heads, block: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """This program's batch entry, head and rows."""
    number = tl.program_id(0)
    pair = (number // blocks).to(tl.int64)
    return pair // heads, pair % heads, (number % blocks).to(tl.int64) * block + tl.arange(0, block)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    weighted, maximum, total, part_weighted, part_maximum, part_total, blocks, heads, rows, width,
    wb, wh, ws, mb, mh, ms, tb, th, ts, pwb, pwh, pws, pmb, pmh, pms, ptb, pth, pts,
    finish: tl.constexpr, block: tl.constexpr, columns: tl.constexpr,
) -> Any:  # fmt: skip
    batch, head, row = _place(blocks, heads, block)
    inside = row < rows
    maximum += batch * mb + head * mh + row * ms
    total += batch * tb + head * th + row * ts
    old_maximum, old_total = tl.load(maximum, inside, float("-inf")), tl.load(total, inside, 0.0)
    new_maximum = tl.load(part_maximum + batch * pmb + head * pmh + row * pms, inside, float("-inf"))
    new_total = tl.load(part_total + batch * ptb + head * pth + row * pts, inside, 0.0)
    largest = tl.maximum(old_maximum, new_maximum)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    old, new = tl.exp(old_maximum - reference), tl.exp(new_maximum - reference)
    # What stands under a row that saw no key is never read into a sum: it may be NaN.
    old_seen, new_seen = old_maximum > float("-inf"), new_maximum > float("-inf")
    sums = old_total * old + new_total * new
    seen = old_seen | new_seen
    if finish:
        divisor = tl.where(seen, tl.where(old_seen, old, 0.0) + tl.where(new_seen, new, 0.0), 1.0)
        old, new = old / divisor, new / divisor
        largest = tl.where(seen, reference + tl.log(divisor), float("-inf"))
    weighted += batch * wb + head * wh + row[:, None] * ws
    part_weighted += batch * pwb + head * pwh + row[:, None] * pws
    for start in range(0, width, columns):
        column = start + tl.arange(0, columns)[None, :]
        place = inside[:, None] & (column < width)
        mine = tl.load(weighted + column, place & old_seen[:, None], 0.0).to(old.dtype)
        theirs = tl.load(part_weighted + column, place & new_seen[:, None], 0.0).to(old.dtype)
        merged = mine * old[:, None] + theirs * new[:, None]
        tl.store(weighted + column, merged.to(weighted.dtype.element_ty), place)
    # Several threads have read the same statistics: none may be written before all have.
    tl.debug_barrier()
    if not finish:
        tl.store(total, sums, inside)
    tl.store(maximum, largest, inside)


@triton.jit  # type: ignore[untyped-decorator]
def _divide(  # type: ignore[no-untyped-def]
    weighted, total, out, blocks, heads, rows, width, wb, wh, ws, tb, th, ts, ob, oh, os,
    block: tl.constexpr, columns: tl.constexpr,
) -> Any:  # fmt: skip
    batch, head, row = _place(blocks, heads, block)
    inside = row < rows
    sums = tl.load(total + batch * tb + head * th + row * ts, inside, 0.0)
    seen = sums != 0.0
    weighted += batch * wb + head * wh + row[:, None] * ws
    out += batch * ob + head * oh + row[:, None] * os
    for start in range(0, width, columns):
        column = start + tl.arange(0, columns)[None, :]
        place = inside[:, None] & (column < width)
        value = tl.load(weighted + column, place & seen[:, None], 0.0) / tl.where(seen, sums, 1.0)[:, None]
        tl.store(out + column, value.to(out.dtype.element_ty), place)


@triton.jit  # type: ignore[untyped-decorator]
def _lse(  # type: ignore[no-untyped-def]
    maximum, total, lse, blocks, heads, rows, mb, mh, ms, tb, th, ts, lb, lh, ls,
    empty: tl.constexpr, block: tl.constexpr,
) -> Any:  # fmt: skip
    batch, head, row = _place(blocks, heads, block)
    inside = row < rows
    top = tl.load(maximum + batch * mb + head * mh + row * ms, inside, float("-inf"))
    sums = tl.load(total + batch * tb + head * th + row * ts, inside, 0.0)
    seen = (top != float("-inf")) & (sums != 0.0)
    value = tl.where(seen, top + tl.log(tl.where(seen, sums, 1.0)), empty)
    tl.store(lse + batch * lb + head * lh + row * ls, value, inside)


@triton.jit(do_not_specialize=["step", "width"])  # type: ignore[untyped-decorator]
def _packed(  # type: ignore[no-untyped-def]
    stacked, out, lse, step, width, count: tl.constexpr, columns: tl.constexpr
) -> Any:
    """One row of each partial, in the order of partials."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, columns)
    inside = column < width
    start = stacked + row * (width + 2)
    largest = float("-inf")
    for n in tl.static_range(count):
        total, maximum = tl.load(start + n * step + width + 1), tl.load(start + n * step + width)
        largest = tl.maximum(largest, tl.where(total != 0.0, maximum, float("-inf")))
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    sums = 0.0
    found = tl.zeros((columns,), tl.float32)
    for n in tl.static_range(count):
        total, maximum = tl.load(start + n * step + width + 1), tl.load(start + n * step + width)
        # What stands in a row that saw no key is never read into a sum: it may be NaN. NaN in one that did shows.
        seen = tl.where(maximum != float("-inf"), tl.where(total != 0.0, 1, 0), 0)
        factor = tl.where(seen == 1, tl.exp(maximum - reference), 0.0)
        sums += tl.where(seen == 1, factor * total, 0.0)
        found += tl.where(seen == 1, factor * tl.load(start + n * step + column, inside, 0.0), 0.0)
    unseen = sums == 0.0
    sums = tl.where(unseen, 1.0, sums)
    tl.store(out + row * width + column, (found / sums).to(out.dtype.element_ty), inside)
    tl.store(lse + row, tl.where(unseen, float("-inf"), reference + tl.log(sums)))
