"""Sizes of blocks for the kernels in Triton: those whose numbers stay in a GPU's registers and shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NARROWEST = 16  # columns of a block that tensor cores take
# For each kernel and (bytes of a number, columns up to): rows, keys, warps, stages of the loop.
_SIZES = {
    "forward": {
        (2, 64): (128, 64, 4, 3), (2, 128): (128, 64, 8, 3), (2, 256): (64, 32, 4, 2),
        (4, 64): (64, 64, 4, 2), (4, 128): (64, 32, 4, 2), (4, 256): (32, 16, 8, 1),
    },
    "query_gradient": {
        (2, 64): (64, 64, 4, 2), (2, 128): (128, 64, 8, 2), (2, 256): (32, 32, 4, 1),
        (4, 64): (64, 32, 4, 2), (4, 128): (32, 32, 8, 1), (4, 256): (16, 16, 4, 1),
    },
    "key_gradients": {
        (2, 64): (64, 64, 8, 2), (2, 128): (64, 64, 8, 2), (2, 256): (32, 64, 8, 1),
        (4, 64): (16, 64, 4, 2), (4, 128): (16, 64, 8, 1), (4, 256): (16, 16, 8, 1),
    },
    "bias_gradient": {
        (2, 64): (64, 64, 4, 2), (2, 128): (64, 64, 8, 2), (2, 256): (64, 64, 8, 1),
        (4, 64): (64, 64, 4, 2), (4, 128): (32, 16, 4, 1), (4, 256): (32, 16, 8, 1),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """The sizes for one kernel: rows, keys, and columns of k and v, which are powers of 2.

    precision: how float32 is multiplied. Three products of TF32 parts keep float32's digits (that of the two small
    parts alone is left out, 2^-22 of the whole) whatever torch.backends says; wide heads have no registers for them.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    wide: int
    wide_values: int
    precision: str

    @classmethod
    def of(cls, kernel: str, dtype: torch.dtype, width: int, values: int) -> Blocks:
        """Those for q and k with ``width`` columns and v with ``values``."""
        wide, wide_values = (max(_NARROWEST, 1 << (x - 1).bit_length()) for x in (width, values))
        most = max(64, wide, wide_values)
        precision = "tf32x3" if dtype == torch.float32 and most <= 128 else "ieee"
        return cls(*_SIZES[kernel][dtype.itemsize, most], wide, wide_values, precision)

    @property
    def choices(self) -> dict[str, int | str]:
        """What a kernel is compiled for."""
        return {
            "block_rows": self.rows, "block_keys": self.keys, "num_warps": self.warps, "num_stages": self.stages,
            "wide": self.wide, "wide_values": self.wide_values, "precision": self.precision,
        }  # fmt: skip
