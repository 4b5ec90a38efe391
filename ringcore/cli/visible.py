"""Counting the visible pairs of a call, for the rate and for the progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ringcore.values import Array, Band, Tile

_PART = 1 << 16


def pairs_of_rows(
    runs: Sequence[range],
    keys: int,
    *,
    causal: bool,
    window: tuple[int | None, int | None],
    offsets: Sequence[int],
    key_lengths: Sequence[int] | None,
) -> int:
    """How many (query, key) pairs of the rows at ``runs`` are visible, over the batch, for one head.

    Bias and mask arrays are not looked at.
    """
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    total = 0
    for entry, offset in enumerate(offsets):
        limit = keys if key_lengths is None else min(keys, key_lengths[entry])
        for run in runs:
            for first in range(0, len(run), _PART):
                part = run[first : first + _PART]
                at = np.arange(part.start, part.stop, part.step, dtype=np.int64) + offset
                low = np.zeros_like(at) if left is None else np.clip(at - left, 0, limit)
                high = np.full_like(at, limit) if right is None else np.clip(at + right + 1, 0, limit)
                total += int(np.maximum(high - low, 0).sum())
    return total


def pairs_of_tiles(tiles: Iterable[Tile]) -> int:
    """How many (query, key) pairs the tiles show, over their batch entries and heads, as often as they do."""
    total = 0
    for tile in tiles:
        entries = tile.batch.stop - tile.batch.start
        total += entries * tile.heads * int(pairs_in_band(tile.band, tile.height, tile.width).sum())
    return total


def pairs_in_band(band: Band, height: int, width: int) -> Array:
    """For each row of a height x width tile how many of its columns the band shows [height]."""
    at = np.arange(height, dtype=np.int64)
    low = np.zeros_like(at) if band.lo is None else np.clip(at + band.lo, 0, width)
    high = np.full_like(at, width) if band.hi is None else np.clip(at + band.hi + 1, 0, width)
    return np.maximum(high - low, 0)
