"""Partials in Torch: from fused kernels, merged in place, and finished; the library's `ringcore.Arithmetic`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ringcore import Partial

_ones: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


def from_kernel(out: torch.Tensor, lse: torch.Tensor) -> Partial:
    """The partial of a kernel in which every row saw a key: out [B, H, S, E] in any dtype, lse [B, H, S]."""
    return Partial(out, lse, _ones_like(lse))


def _ones_like(lse: torch.Tensor) -> torch.Tensor:
    """One number for all rows. It is kept, because to make it takes as long as the launch of any kernel."""
    if lse.numel() == 1 or (lse.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.ones_like(lse)  # that others may write to, or in the graph's memory, which goes with it
    key = lse.dtype, lse.device
    if key not in _ones:
        with torch.inference_mode(False):
            _ones[key] = torch.ones((), dtype=lse.dtype, device="cpu").to(lse.device)  # there before a stream reads it
    return _ones[key].expand(lse.shape)


def _all_one(total: torch.Tensor) -> bool:
    """Whether it is that of a partial from a kernel: one number for all rows."""
    return total.numel() > 1 and not any(total.stride())


def merge_rows(state: Partial, rows: tuple[Any, ...], part: Partial) -> Partial:
    """``part`` merged into the rows of ``state`` at this index, in place.

    What ``part`` holds in a row that saw no key is multiplied by 0: it must be finite.
    """
    if _all_one(state.total):
        state = Partial(state.weighted, state.maximum, state.total.contiguous())
    state = state.widened
    weighted, maximum, total = (x[rows] for x in (state.weighted, state.maximum, state.total))
    one_pass = _one_pass(weighted, part.weighted)
    if one_pass is not None:
        one_pass.merge_into((weighted, maximum, total), (part.weighted, part.maximum, part.total))
        return state
    largest = torch.maximum(maximum, part.maximum)
    reference = largest.masked_fill(largest == -torch.inf, 0.0)
    old, new = torch.exp(maximum - reference), torch.exp(part.maximum - reference)
    weighted.mul_(old[..., None])
    if part.weighted.dtype == weighted.dtype:
        weighted.addcmul_(part.weighted, new[..., None])
    else:
        weighted += part.weighted * new[..., None]
    total.mul_(old).addcmul_(part.total, new)
    maximum.copy_(largest)
    return state


def finished(
    partial: Partial, dtype: torch.dtype, last: tuple[tuple[Any, ...], Partial] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out in ``dtype``, maximum and total of ``partial`` with ``last`` merged in.

    The buffers of ``partial`` are used up.
    """
    if last is not None and not _finished_in_place(partial, dtype, *last):
        partial = merge_rows(partial, *last)
    out: torch.Tensor = partial.weighted
    maximum, total = partial.maximum, partial.total
    if out.dtype != total.dtype or _all_one(total):
        return out.to(dtype), maximum, total  # a fused kernel's, untouched: each total is 1, or 0 over a row of 0
    one_pass = _one_pass(out)
    if one_pass is not None:
        return one_pass.divided(out, total, dtype), maximum, total
    out.div_(total.masked_fill(~partial.seen, 1.0)[..., None])
    return out.to(dtype), maximum, total


def gathers(x: torch.Tensor) -> bool:
    """Whether many partials, or parts of a gradient, of such arrays are brought together in one pass at the end."""
    return x.is_cuda and x.dtype != torch.float64 and _triton() is not None


def finished_together(
    q: torch.Tensor, width: int, parts: Sequence[tuple[tuple[Any, ...], Partial]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """out in ``dtype``, maximum and total of fused kernels' partials, each of some rows of q; None: one by one."""
    known = _known(q, [(index, part.weighted, part.maximum) for index, part in parts])
    if known is None or not all(_all_one(part.total) for _, part in parts):
        return None
    from ringcore_torch.together import merged

    out = _memory_like(q, width, dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    merged(out, lse, known)
    return out, lse, _ones_like(lse)


def summed_together(
    like: torch.Tensor, parts: Sequence[tuple[tuple[Any, ...], torch.Tensor]], dtype: torch.dtype
) -> torch.Tensor | None:
    """The sum of parts, each of some rows of ``like``, in ``dtype``; None: one by one."""
    known = _known(like, [(index, part, None) for index, part in parts])
    if known is None:
        return None
    from ringcore_torch.together import summed

    out = _memory_like(like, like.shape[3], dtype)
    summed(out, known)
    return out


def _known(
    like: torch.Tensor, parts: Sequence[tuple[tuple[Any, ...], torch.Tensor, torch.Tensor | None]]
) -> list[Any] | None:
    """The parts as one pass takes them, or None: some are of a few batch entries alone, or too many of one head."""
    from ringcore_torch.together import Part, fits

    batch, heads, rows = (range(length) for length in like.shape[:3])
    if any(batch[index[0]] != batch or values.stride(-1) != 1 for index, values, _ in parts):
        return None
    known = [Part(heads[index[1]], rows[index[2]], values, lse) for index, values, lse in parts]
    return known if fits(known, len(heads)) else None


def _memory_like(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for [B, H, S, width], heads and rows in the order in which x has them."""
    batch, heads, rows, _ = x.shape
    if x.stride(1) < x.stride(2):
        return torch.empty((batch, rows, heads, width), dtype=dtype, device=x.device).transpose(1, 2)
    return torch.empty((batch, heads, rows, width), dtype=dtype, device=x.device)


def _finished_in_place(state: Partial, dtype: torch.dtype, rows: tuple[Any, ...], part: Partial) -> bool:
    """Whether two finished partials became one in the memory of the first, with no copy in the accumulation dtype."""
    if not (_all_one(state.total) and _all_one(part.total) and state.weighted.dtype == dtype):
        return False
    weighted, maximum, total = (x[rows] for x in (state.weighted, state.maximum, state.total))
    one_pass = _one_pass(weighted, part.weighted)
    if one_pass is not None:
        one_pass.merge_into((weighted, maximum, total), (part.weighted, part.maximum, part.total), finish=True)
    return one_pass is not None


def finished_packed(stacked: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """out [B, H, S, E] in ``dtype`` and lse of n partials [n, B, H, S, E + 2], in one launch; None off GPUs."""
    one_pass = _triton() if stacked.is_cuda and stacked.dtype == torch.float32 else None
    if one_pass is None:
        return None
    found: tuple[torch.Tensor, torch.Tensor] = one_pass.finished_packed(stacked, dtype)
    return found


def finished_lse(maximum: torch.Tensor, total: torch.Tensor, empty: float) -> torch.Tensor:
    """maximum + log(total) [B, H, S], in memory of its own; ``empty`` in rows that saw no key."""
    one_pass = _triton() if maximum.is_cuda else None
    if one_pass is not None:
        lse: torch.Tensor = one_pass.lse_of(maximum, total, empty)
        return lse
    seen = (maximum != -torch.inf) & (total != 0)
    return torch.where(seen, maximum + torch.log(torch.where(seen, total, 1.0)), empty).contiguous()


def _one_pass(*tensors: torch.Tensor) -> ModuleType | None:
    """The arithmetic in one pass, where it runs."""
    return _triton() if all(x.is_cuda and x.stride(-1) == 1 for x in tensors) else None


@cache
def _triton() -> ModuleType | None:
    try:
        from ringcore_torch import one_pass
    except ModuleNotFoundError as exc:
        if exc.name != "triton":
            raise
        return None
    return one_pass
