"""What kernels in Triton are given: arrays by pointer and strides, and the numbers of one tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ringcore import Band, Dropout, Score, Tile
from ringcore_torch.triton_blocks import Blocks
from ringcore_torch.triton_forward import seen_keys

Tensor = torch.Tensor

_FAR = 1 << 30  # a bound of a band that hides nothing
_NOTHING_DRAWN = 0, 0, 1.0, 0, 0, 0, 0, 0, 0, 0
_SIDE = 64  # of the blocks in which seen keys are looked for


class Launch:
    """One tile's arrays and numbers, and the call of a kernel with them.

    inputs: q, k and v with the numbers of each row side by side.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, tile: Tile, score: Score
    ) -> None:
        self.inputs = without_gaps(q), without_gaps(k), without_gaps(v)
        self.batches, self.heads, self.rows, self.width = q.shape
        self.key_heads, self.keys, self.values = k.shape[1], k.shape[2], v.shape[3]
        mask = None if mask is None else mask.view(torch.uint8)
        self._terms = [x for x in (bias, mask) if x is not None]
        # What is not there is never read; a kernel wants a pointer all the same.
        self._pointers = q if bias is None else bias, q if mask is None else mask
        self._steps = *_broadcast_strides(bias), *_broadcast_strides(mask)
        band = tile.band
        self._band = -_FAR if band.lo is None else band.lo, _FAR if band.hi is None else band.hi
        self._drops = bool(score.dropout)
        self._draw = _numbers(Dropout.of(score, tile)) if self._drops else _NOTHING_DRAWN
        self._hides = {"banded": band != Band(), "biased": bias is not None, "masked": mask is not None}
        self._cap = score.softcap or 1.0
        self._soft = score.softcap is not None
        self._scale = score.scale

    def blocks(self, kernel: Any) -> Blocks:
        """The sizes of blocks for this kernel."""
        return Blocks.of(kernel.__name__, self.inputs[0].dtype, self.width, self.values)

    def over_rows(
        self, kernel: Any, inputs: Sequence[Tensor], statistics: Sequence[Tensor], rowwise: Sequence[Tensor],
        **choices: bool,
    ) -> None:  # fmt: skip
        """Run the kernel for each batch entry, head of q and block of rows.

        inputs and rowwise are arrays [B, H, S, D]; statistics [B, H, S], without gaps.
        """
        programs = self.batches * self.heads * -(-self.rows // self.blocks(kernel).rows)
        self._run(kernel, programs, inputs, statistics, rowwise, **choices)

    def over_keys(self, kernel: Any, statistics: Sequence[Tensor], rowwise: Sequence[Tensor]) -> None:
        """Run the kernel for each batch entry, head of k and block of keys, on arrays as `over_rows`."""
        programs = self.batches * self.key_heads * -(-self.keys // self.blocks(kernel).keys)
        self._run(kernel, programs, self.inputs, statistics, rowwise)

    def over_bias(self, kernel: Any, statistics: Sequence[Tensor], dout: Tensor, dbias: Tensor) -> None:
        """Run the kernel for each block of dbias, each of whose axes has the tile's length or 1."""
        sizes = self.blocks(kernel)
        batches, heads, rows, keys = dbias.shape
        programs = batches * heads * -(-rows // sizes.rows) * -(-keys // sizes.keys)
        once = {"batch_once": batches == 1, "head_once": heads == 1, "row_once": rows == 1, "key_once": keys == 1}
        self._run(kernel, programs, self.inputs, statistics, (dout,), dbias, *dbias.stride(), self.batches, **once)

    def with_seen(self, which: int) -> list[Tensor]:
        """q, k and v, one of them with 0 in keys that no row sees: what they hold would be multiplied by 0."""
        found = list(self.inputs)
        if not self._terms:
            return found  # what a band hides from a block of rows is not read for it
        batches, heads = (max(x.shape[axis] for x in self._terms) for axis in range(2))
        shown = torch.empty((batches, heads, self.keys), dtype=torch.uint8, device=found[0].device)
        with torch.cuda.device_of(shown):  # type: ignore[no-untyped-call]
            seen_keys[batches * heads * -(-self.keys // _SIDE),](
                *self._pointers, shown, *self._steps, heads, self.rows, self.keys, *self._band,
                **self._hides, block_rows=_SIDE, block_keys=_SIDE,
            )  # fmt: skip
        unseen = shown == 0
        if heads > 1:  # a head of k may serve several heads of q
            unseen = unseen.view(batches, self.key_heads, -1, self.keys).all(2)
        found[which] = found[which].masked_fill(unseen[..., None], 0.0)
        return found

    def _run(
        self, kernel: Any, programs: int, inputs: Sequence[Tensor], statistics: Sequence[Tensor],
        rowwise: Sequence[Tensor], *further: Any, **choices: bool,
    ) -> None:  # fmt: skip
        with torch.cuda.device_of(inputs[0]):  # type: ignore[no-untyped-call]
            kernel[programs,](
                *inputs, *self._pointers, *statistics, *rowwise,
                *_strides(inputs), *self._steps, *_strides(rowwise), *further,
                self.heads, self.heads // self.key_heads, self.rows, self.keys, *self._band,
                self._scale, self._cap, self.width, self.values, *self._draw,
                **self._hides, soft=self._soft, drops=self._drops, **self.blocks(kernel).choices, **choices,
            )  # fmt: skip


def ordered_like(x: Tensor) -> Tensor:
    """Memory for [B, H, S, D] in float32, heads and rows in the order in which x has them."""
    batch, heads, rows, width = x.shape
    if x.stride(1) < x.stride(2):
        return torch.empty((batch, rows, heads, width), dtype=torch.float32, device=x.device).transpose(1, 2)
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def without_gaps(x: Tensor) -> Tensor:
    """x, or a copy of it, with the numbers of each row side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _numbers(draw: Dropout) -> tuple[int | float, ...]:
    """As kernels take them: a word is an integer of 32 bits, whatever its sign then is."""
    seed, least = (word - (word >> 31 << 32) for word in (draw.seed, draw.least))
    return seed, least, *draw[2:]


def _strides(arrays: Sequence[Tensor]) -> list[int]:
    """Those of the axes batch, head and row."""
    return [step for x in arrays for step in x.stride()[:3]]


def _broadcast_strides(term: Tensor | None) -> list[int]:
    """Those of four axes, 0 where the axis has one entry for all."""
    if term is None:
        return [0, 0, 0, 0]
    return [0 if length == 1 else step for length, step in zip(term.shape, term.stride(), strict=True)]
