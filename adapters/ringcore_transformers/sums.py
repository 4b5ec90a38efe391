"""Sums over the ring: the loss as a mean over all ranks' tokens, and the gradients of parameters that all ranks hold.

The law: every rank's loss has the value of the whole batch's and the gradient of this rank's tokens alone, so that the
gradients *added* over the ranks are those of one process with the whole batch. DistributedDataParallel does not add
them, it takes their mean: too small by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy

from ringcore import KeywordError, ShapeError
from ringcore_transformers.batch import IGNORED


def loss(logits: torch.Tensor, labels: torch.Tensor, ring: Any = None) -> torch.Tensor:
    """The mean cross entropy over the tokens of all ranks, in float32 (float64 for float64).

    logits: [B, S, vocabulary], this rank's. labels: [B, S] int64, this rank's, already the ones that each position is
    to predict ("shift_labels" of `split_batch`); -100 counts for nothing. ring: a torch ProcessGroup or a DeviceMesh of
    one dimension; None for one process. All its ranks must call.

    The value is the same on every rank. The gradient is that of this rank's tokens: add the ranks' with
    `sum_gradients`. NaN if there is no token to predict on any rank, as torch has it.

    Raises ShapeError if logits and labels do not fit, KeywordError for a ring that torch.distributed does not know.
    """
    group = _group(ring)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ShapeError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; they must be [B, S, "
            "vocabulary] and [B, S] of the same tokens."
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    share = cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum()
    if group is None:
        return share / count
    dist.all_reduce(count, group=group)
    total: torch.Tensor = _SumOverRanks.apply(share / count, group)  # type: ignore[no-untyped-call]
    return total


def sum_gradients(parameters: Iterable[torch.nn.Parameter], ring: Any = None) -> None:
    """Add up the ranks' gradients of parameters that all ranks hold, in place: those of the whole batch.

    All ranks must call, once after backward, with the same parameters in the same order. A rank whose tokens did not
    meet a parameter (an expert, say) has no gradient for it and counts as zeros.
    """
    group = _group(ring)
    if group is None:
        return
    trained = [x for x in parameters if x.requires_grad]
    for x in trained:
        if x.grad is None:
            x.grad = torch.zeros_like(x)
    pending = [dist.all_reduce(x.grad, group=group, async_op=True) for x in trained]
    for work in pending:
        work.wait()


class _SumOverRanks(torch.autograd.Function):
    """A sum whose gradient each rank takes for its own share, and no rank twice."""

    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = share.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _group(ring: Any) -> dist.ProcessGroup | None:
    if isinstance(ring, DeviceMesh) and ring.ndim == 1:
        return ring.get_group()
    if ring is None or isinstance(ring, dist.ProcessGroup):
        return ring
    raise KeywordError(
        f"ring is {ring!r}; it must be a torch.distributed ProcessGroup, a DeviceMesh of one dimension, or None for "
        "one process."
    )
