"""Partials in Torch: from fused kernels, merged in place, and finished; the library's `ringcore.Arithmetic`."""

from __future__ import annotations

from typing import Any

import torch

from ringcore import Partial


def from_kernel(out: torch.Tensor, lse: torch.Tensor) -> Partial:
    """The partial of a kernel in which every row saw a key: out [B, H, S, E] in any dtype, lse [B, H, S]."""
    return Partial(out, lse, torch.ones_like(lse))


def merge_rows(state: Partial, rows: tuple[Any, ...], part: Partial) -> Partial:
    """``part`` merged into the rows of ``state`` at this index, in place.

    What ``part`` holds in a row that saw no key is multiplied by 0: it must be finite.
    """
    state = state.widened
    weighted, maximum, total = (x[rows] for x in (state.weighted, state.maximum, state.total))
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


def finished(partial: Partial, dtype: torch.dtype) -> torch.Tensor:
    """``partial.out`` in ``dtype``; the buffers of ``partial.weighted`` are used up."""
    out: torch.Tensor = partial.weighted
    if out.dtype == partial.total.dtype:  # else a fused kernel's, untouched: each total is 1, or 0 over a row of 0
        out.div_(partial.total.masked_fill(~partial.seen, 1.0)[..., None])
    return out.to(dtype)
