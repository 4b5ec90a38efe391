"""A tile forward: blocks of scores, their weights beside the new maximum, and the weighted sum of v."""

from __future__ import annotations

from ringcore import Array, Band, Partial
from ringcore_cupy.blocks import Block, Scratch, Sides, blocks
from ringcore_cupy.compiling import BLOCK, rows_grid
from ringcore_cupy.operands import Clean, Operand, Statistic, Sums, accumulation
from ringcore_cupy.products import Matrices, Products, products
from ringcore_cupy.terms import Terms


class Forward:
    """One tile's arrays [B, H, S, D], and the partial that they are added to in place."""

    def __init__(self, q: Array, k: Array, v: Array, state: Partial, terms: Terms, scratch: Scratch) -> None:
        self._shape, self._keys, self._values = q.shape, k.shape[2], v.shape[3]
        self._group, self._wide = q.shape[1] // k.shape[1], accumulation(q)
        self._v, self._sums = Clean(v), Sums(state.weighted)
        self._operands: dict[str, Operand] = {"q": Operand(q), "k": Operand(k), "v": self._v, "weighted": self._sums}
        self._maximum, self._total = Statistic(state.maximum), Statistic(state.total)
        self._terms, self._weigh, self._scratch = terms, terms.kernel("weigh"), scratch

    def run(self, band: Band, sides: Sides, scale: float) -> None:
        """Add what the band shows."""
        with products(self._wide) as product:
            for entry in range(self._shape[0]):
                arrays = {name: x.of(entry) for name, x in self._operands.items()}
                for block in blocks(band, self._shape[2], self._keys, sides):
                    self._block(product, arrays, entry, block, scale)
        self._sums.close()

    def _block(self, product: Products, arrays: dict[str, Matrices], entry: int, block: Block, scale: float) -> None:
        row, key, rows, keys = block.rows[0], block.keys[0], block.height, block.width
        scores, weights, weighted = self._scratch.scores, self._scratch.weights, arrays["weighted"].part(row)
        product.put(
            arrays["q"].part(row), arrays["k"].part(key), scores, rows, keys, self._shape[3],
            scale=scale, turned=(False, True),
        )  # fmt: skip
        self._weigh(
            rows_grid(1, self._shape[1], rows), (BLOCK,),
            (
                scores.address, weights.address, rows, keys, scores.head, scores.row, weighted.address,
                self._maximum.of(entry, row), self._total.of(entry, row), self._values, weighted.head, weighted.row,
                *self._maximum.steps, *self._total.steps, *self._v.poisoned(entry, key), self._group,
                *self._terms.arguments(entry, block),
            ),
        )  # fmt: skip
        product.put(weights, arrays["v"].part(key), weighted, rows, self._values, keys, add=True)
