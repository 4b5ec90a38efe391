"""The gradient of bias, whose axes of length 1 are sums over heads, rows or keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ringcore import Array
from ringcore_numpy.threads import Scratch
from ringcore_numpy.tiles import Span, cut


class BiasGradient:
    """What one task, the keys of some query heads, adds to dbias [B or 1, H or 1, S or 1, T or 1].

    Where dbias has rows, `add` writes to it, and the caller keeps tasks in order row by row. Where one row
    stands for all, `add` sums in scratch memory until `flush`, and the caller keeps the flushes in order.
    """

    def __init__(self, dbias: Array, batch: int, heads: Sequence[int], keys: Span, scratch: Scratch) -> None:
        self._dbias, self._batch, self._heads, self._keys = dbias, batch, heads, keys
        self.by_row = dbias.shape[2] > 1
        self._sums: Array = None
        if not self.by_row:
            width = keys[1] - keys[0] if dbias.shape[3] > 1 else 1
            self._sums = scratch.take("dbias", (len(heads), 1, width), dbias.dtype)
            self._sums.fill(0)

    def add(self, head: int, rows: Span, columns: Span, slopes: Array) -> None:
        """Add the gradients of a tile's scores [n, m]."""
        if self._dbias.shape[3] == 1:
            slopes = np.sum(slopes, axis=1, keepdims=True)
        if self.by_row:
            cut(self._dbias, (self._batch, head), rows, columns)[...] += slopes
            return
        start = self._keys[0]
        part = slice(columns[0] - start, columns[1] - start) if self._dbias.shape[3] > 1 else slice(None)
        self._sums[head - self._heads[0], :, part] += np.sum(slopes, axis=0, keepdims=True)

    def flush(self) -> None:
        """Add the task's own sums."""
        for head, share in zip(self._heads, self._sums, strict=True):
            cut(self._dbias, (self._batch, head), (0, 1), self._keys)[...] += share
