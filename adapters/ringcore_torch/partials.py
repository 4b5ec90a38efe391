"""Partials in Torch: from fused kernels, and merged in place."""

from __future__ import annotations

import torch

from ringcore import Partial


def from_kernel(out: torch.Tensor, lse: torch.Tensor) -> Partial:
    """The partial of a kernel in which every row saw a key: out [B, H, S, E] in any dtype, lse [B, H, S]."""
    return Partial(out, lse, torch.ones_like(lse))


def add_rows(state: Partial, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge what a kernel found for some rows into these rows of the state, in place.

    lse is -inf, and out 0, in a row that saw no key; such a row changes nothing.
    """
    weighted, maximum, total = (x[:, :, rows] for x in (state.weighted, state.maximum, state.total))
    largest = torch.maximum(maximum, lse)
    reference = largest.masked_fill(largest == -torch.inf, 0.0)
    old, new = torch.exp(maximum - reference), torch.exp(lse - reference)
    weighted.mul_(old[..., None])
    if out.dtype == weighted.dtype:
        weighted.addcmul_(out, new[..., None])
    else:
        weighted += out * new[..., None]
    total.mul_(old).add_(new)
    maximum.copy_(largest)
