"""How blocks lie in memory that GPUs copy by pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from ringcore import Spec

_ALIGNED = 256  # bytes between the starts of arrays
_LARGEST_PITCH = 2**31 - 1  # bytes: cudaDevAttrMaxPitch of all GPUs so far


def size_of(spec: Spec) -> int:
    """The bytes of an array like this."""
    return math.prod(spec.shape) * int(np.dtype(spec.dtype).itemsize)


def starts(specs: Sequence[Spec]) -> list[int]:
    """Where each of the arrays begins, one after the other, and where the last one ends."""
    found = [0]
    for spec in specs:
        found.append(found[-1] + -(-size_of(spec) // _ALIGNED) * _ALIGNED)
    return found


def room(specs: Sequence[Spec]) -> int:
    """The bytes that arrays like these take together."""
    return starts(specs)[-1]


def rows_first(shape: Sequence[int]) -> tuple[int, ...]:
    """[B, S, H, D] of [B, H, S, D] and back: so rows are one piece, and fused kernels like it."""
    batch, heads, rows, width = shape
    return batch, rows, heads, width


def empty_rows_first(shape: Sequence[int], dtype: Any) -> Any:
    """Memory for [B, H, S, D] that lies as [B, S, H, D]."""
    return cupy.empty(rows_first(shape), dtype).transpose(0, 2, 1, 3)


def lies_rows_first(x: Any) -> bool:
    """Whether [B, H, S, D] lies as [B, S, H, D] without gaps, and not also the other way."""
    return bool(x.transpose(0, 2, 1, 3).flags.c_contiguous and not x.flags.c_contiguous)


def copy_rows(
    target: int, source: int, spec: Spec, rows: range, length: int, places: range, stream: Any
) -> None:  # fmt: skip
    """Copy the ``rows`` of a block at ``source`` to the ``places`` of one of ``length`` rows at ``target``.

    Both lie as [B, S, H, D], at addresses that this process can reach; ``spec`` is the source's, as [B, H, S, D].
    """
    batch, heads, height, width = spec.shape
    row, count = heads * width * np.dtype(spec.dtype).itemsize, len(rows)
    if not batch * row * count:
        return
    target, source = target + places[0] * row, source + rows[0] * row
    if count == 1 or rows.step == places.step == 1:
        _copy_pieces(target, length * row, source, height * row, count * row, batch, stream)
        return
    for entry in range(batch):
        to, of = target + entry * length * row, source + entry * height * row
        _copy_pieces(to, places.step * row, of, rows.step * row, row, count, stream)


def _copy_pieces(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: Any
) -> None:
    """Copy ``height`` pieces of ``width`` bytes, each a pitch of bytes behind the last, by one call if CUDA can."""
    if height > 1 and max(target_pitch, source_pitch) <= _LARGEST_PITCH:
        runtime.memcpy2DAsync(
            target, target_pitch, source, source_pitch, width, height, runtime.memcpyDefault, stream.ptr
        )
        return
    for n in range(height):
        to, of = target + n * target_pitch, source + n * source_pitch
        runtime.memcpyAsync(to, of, width, runtime.memcpyDefault, stream.ptr)
