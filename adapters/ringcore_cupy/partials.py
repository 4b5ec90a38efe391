"""Partials in CuPy, merged and finished in one pass over memory each; the library's `ringcore.Arithmetic`."""

from __future__ import annotations

from functools import cache
from typing import Any

import cupy

from ringcore import Array, Partial, UnsupportedError, merge
from ringcore_cupy.compiling import BLOCK, MOST_PLACES, kernel, numbers_grid, rows_grid, steps


def check_array(x: Array) -> None:
    """Raise UnsupportedError unless x is on the current device: CuPy makes new arrays there, whatever is asked."""
    due, came = cupy.cuda.Device().id, x.device.id
    if came != due:
        raise UnsupportedError(
            f"the arrays are on GPU {came}, but GPU {due} is the current one, on which CuPy would make what they are "
            f"computed with. Call cupy.cuda.Device({came}).use() first."
        )


def merge_rows(state: Partial, rows: tuple[Any, ...], part: Partial) -> Partial:
    """``part`` merged into the rows of ``state`` at this index, in place; see `ringcore.Partial`."""
    if _all_one(state.total):  # one number for all rows, which others may read
        state = Partial(state.weighted, state.maximum, state.total.copy())
    state = state.widened
    mine = state.weighted[rows], state.maximum[rows], state.total[rows]
    if _in_one_pass(mine, part):
        _merge_into(mine, part, finish=False)
    else:
        merged = merge(Partial(*mine), part)
        for place, found in zip(mine, (merged.weighted, merged.maximum, merged.total), strict=True):
            place[...] = found
    return state


def finished(
    partial: Partial, dtype: Any, last: tuple[tuple[Any, ...], Partial] | None = None
) -> tuple[Array, Array, Array]:
    """out in ``dtype``, maximum and total of ``partial`` with ``last`` merged in.

    The buffers of ``partial`` are used up.
    """
    if last is not None and not _finished_in_place(partial, dtype, *last):
        partial = merge_rows(partial, *last)
    weighted, maximum, total = partial.weighted, partial.maximum, partial.total
    if weighted.dtype != total.dtype or _all_one(total):
        return weighted.astype(dtype, copy=False), maximum, total  # a fused kernel's: each total is 1
    if not _dense(weighted):
        return partial.out.astype(dtype, copy=False), maximum, total
    return _divided(weighted, maximum, total, cupy.dtype(dtype)), maximum, total


def finished_lse(maximum: Array, total: Array, empty: float) -> Array:
    """maximum + log(total) [B, H, S], in memory of its own; ``empty`` in rows that saw no key."""
    if max(maximum.shape[:2]) > MOST_PLACES:
        return cupy.where((maximum != -cupy.inf) & (total != 0), maximum + cupy.log(total), empty)
    with maximum.device:
        lse = cupy.empty(maximum.shape, dtype=maximum.dtype)
        if lse.size:
            batch, heads, rows = lse.shape
            run = _kernel("lse", lse.dtype, lse.dtype, lse.dtype)
            run(
                numbers_grid(batch, heads, rows), (BLOCK,),
                (maximum, total, lse, rows, float(empty), *steps(maximum), *steps(total)),
            )  # fmt: skip
    return lse


def _finished_in_place(state: Partial, dtype: Any, rows: tuple[Any, ...], part: Partial) -> bool:
    """Whether two finished partials became one in the memory of the first, with no copy in the accumulation dtype."""
    if not (_all_one(state.total) and _all_one(part.total) and state.weighted.dtype == dtype):
        return False
    mine = state.weighted[rows], state.maximum[rows], state.total[rows]
    able = _in_one_pass(mine, part)
    if able:
        _merge_into(mine, part, finish=True)
    return able


def _merge_into(mine: tuple[Array, Array, Array], part: Partial, finish: bool) -> None:
    weighted, maximum, _ = mine
    if not weighted.size:
        return
    batch, heads, rows, width = weighted.shape
    arrays = (*mine, part.weighted, part.maximum, part.total)
    run = _kernel("merge", maximum.dtype, weighted.dtype, part.weighted.dtype)
    with weighted.device:
        run(
            rows_grid(batch, heads, rows), (BLOCK,),
            (*arrays, rows, width, int(finish), *(step for x in arrays for step in steps(x)[:3])),
        )  # fmt: skip


def _divided(weighted: Array, maximum: Array, total: Array, dtype: Any) -> Array:
    """weighted / total in ``dtype``, heads and rows in the order in which weighted has them; in place if it can be."""
    batch, heads, rows, width = weighted.shape
    with weighted.device:
        if weighted.dtype == dtype:
            out = weighted
        elif weighted.strides[1] < weighted.strides[2]:
            out = cupy.empty((batch, rows, heads, width), dtype=dtype).swapaxes(1, 2)
        else:
            out = cupy.empty(weighted.shape, dtype=dtype)
        if out.size:
            arrays = weighted, maximum, total, out
            run = _kernel("divide", total.dtype, weighted.dtype, dtype)
            run(
                rows_grid(batch, heads, rows), (BLOCK,),
                (*arrays, rows, width, *(step for x in arrays for step in steps(x)[:3])),
            )  # fmt: skip
    return out


def _all_one(total: Array) -> bool:
    """Whether it is that of a partial from a fused kernel: one number for all rows."""
    return total.size > 1 and not any(total.strides)


def _in_one_pass(mine: tuple[Array, Array, Array], part: Partial) -> bool:
    """Whether the kernel takes them: rows without gaps, statistics of one dtype."""
    statistics = {x.dtype for x in (*mine[1:], part.maximum, part.total)}
    return _dense(mine[0]) and _dense(part.weighted) and len(statistics) == 1


def _dense(weighted: Array) -> bool:
    """Whether its rows have no gaps, and are as many as a grid takes."""
    last = weighted.shape[3] == 1 or weighted.strides[3] == weighted.itemsize
    return bool(last and max(weighted.shape[:2]) <= MOST_PLACES)


@cache
def _kernel(name: str, wide: Any, state: Any, part: Any) -> Any:
    return kernel("partials.cu", name, WIDE=wide, STATE=state, PART=part)
