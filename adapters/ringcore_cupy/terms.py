"""What is done to the scores of a block, as its kernels are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringcore import Array, Dropout, Score, Tile
from ringcore_cupy.blocks import MOST_KEYS, Block
from ringcore_cupy.compiling import kernel, steps


class Terms:
    """Softcap, bias, mask and dropout of a tile, and the kernels that are compiled for them."""

    def __init__(
        self, score: Score, tile: Tile, bias: Array | None, mask: Array | None, wide: Any, narrow: Any
    ) -> None:
        self._cap = float(score.softcap or 0.0)
        self._bias, self._mask = _Term(bias), _Term(mask)
        self._draw = Dropout.of(score, tile) if score.dropout else None
        self._kinds: Mapping[str, Any] = {
            "WIDE": wide, "NUMBER": narrow, "BIAS": wide if bias is None else bias.dtype,
            "SOFT": int(score.softcap is not None), "DROPS": int(self._draw is not None), "MOST_KEYS": MOST_KEYS,
        }  # fmt: skip

    def kernel(self, name: str) -> Any:
        """The kernel of this name."""
        return kernel("tiled.cu", name, **self._kinds)

    def arguments(self, entry: int, block: Block) -> tuple[int | float, ...]:
        """The last arguments of kernels of scores, for a batch entry."""
        found = *self._bias.of(entry, block), *self._mask.of(entry, block), *block.bounds, self._cap
        return found if self._draw is None else (*found, *self._draw.corner(entry, block.rows[0], block.keys[0]))


class _Term:
    """A bias or mask [B, H, S, T], each of whose axes may have one entry for all."""

    def __init__(self, x: Array | None) -> None:
        self._x = x
        if x is not None:
            self._steps = [0 if length == 1 else step for length, step in zip(x.shape, steps(x), strict=True)]
            self._address, self._size = int(x.data.ptr), x.itemsize

    def of(self, entry: int, block: Block) -> tuple[int, int, int, int]:
        """The address of the block's corner and the strides of heads, rows and keys; an address of 0 is none."""
        if self._x is None:
            return 0, 0, 0, 0
        batch, head, row, key = self._steps
        corner = entry * batch + block.rows[0] * row + block.keys[0] * key
        return self._address + corner * self._size, head, row, key
