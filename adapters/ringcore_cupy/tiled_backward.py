"""A tile backward: the weights are made again from the finished rows' statistics, block by block."""

from __future__ import annotations

import cupy

from ringcore import Array, Band, Gradients
from ringcore_cupy.blocks import Block, Scratch, Sides, blocks
from ringcore_cupy.compiling import BLOCK, numbers_grid, rows_grid, steps
from ringcore_cupy.operands import Clean, Operand, Statistic, Sums, accumulation
from ringcore_cupy.products import Matrices, Products, products
from ringcore_cupy.terms import Terms

_SIDEWAYS = False, True  # first @ second^T
_UPRIGHT = True, False  # first^T @ second


class Backward:
    """One tile's dout, q, k and v [B, H, S, D], the rows' statistics, and the gradients that are added to in place."""

    def __init__(
        self, arrays: dict[str, Array], statistics: tuple[Array, Array, Array], into: Gradients, terms: Terms,
        scratch: Scratch, more: Scratch,
    ) -> None:  # fmt: skip
        q, v = arrays["q"], arrays["v"]
        self._shape, self._keys, self._values, self._wide = q.shape, v.shape[2], v.shape[3], accumulation(q)
        clean = {name: Clean(arrays[name]) for name in ("dout", "q", "k")}
        self._clean, self._group = tuple(clean.values()), q.shape[1] // v.shape[1]
        sums = {"dq": into.dq, "dk": into.dk, "dv": into.dv}
        self._sums = {name: Sums(x) for name, x in sums.items() if x is not None}
        self._operands = {name: Operand(x) for name, x in arrays.items()}
        self._operands.update({f"clean {name}": x for name, x in clean.items()})
        self._operands.update(self._sums)
        self._statistics = [Statistic(x) for x in statistics]
        self._dbias = self._wide_dbias = into.dbias
        if self._dbias is not None and self._dbias.dtype != self._wide:  # a bias may be of another dtype
            self._wide_dbias = cupy.zeros(self._dbias.shape, dtype=self._wide)
        self._terms, self._pull_back = terms, terms.kernel("pull_back")
        self._scores, self._weights, self._slopes, self._gradients = (
            scratch.scores, scratch.weights, more.scores, more.weights
        )  # fmt: skip
        self._of_scores = into.dbias is not None or "dq" in self._sums or "dk" in self._sums

    def run(self, band: Band, sides: Sides, scale: float) -> None:
        """Add the gradients of what the band shows."""
        with products(self._wide) as product:
            for entry in range(self._shape[0]):
                arrays = {name: x.of(entry) for name, x in self._operands.items()}
                for block in blocks(band, self._shape[2], self._keys, sides):
                    self._weigh(product, arrays, entry, block, scale)
                    self._add(product, arrays, block, scale)
        for x in self._sums.values():
            x.close()
        if self._dbias is not None and self._wide_dbias is not None and self._dbias is not self._wide_dbias:
            self._dbias += self._wide_dbias.astype(self._dbias.dtype)

    def _weigh(self, product: Products, arrays: dict[str, Matrices], entry: int, block: Block, scale: float) -> None:
        """The block's weights and the gradients of its scores; that of the bias is added."""
        row, key, rows, keys, heads = block.rows[0], block.keys[0], block.height, block.width, self._shape[1]
        scores, slopes = self._scores, self._slopes
        product.put(
            arrays["q"].part(row), arrays["k"].part(key), scores, rows, keys, self._shape[3],
            scale=scale, turned=_SIDEWAYS,
        )  # fmt: skip
        if self._of_scores:
            product.put(
                arrays["dout"].part(row), arrays["v"].part(key), slopes, rows, keys, self._values, turned=_SIDEWAYS
            )
        place, tail = (scores.head, scores.row), self._terms.arguments(entry, block)
        finished = *(x.of(entry, row) for x in self._statistics), *(step for x in self._statistics for step in x.steps)
        if self._wide_dbias is not None:
            own = _part_of_bias(self._wide_dbias, entry, block, heads)
            self._terms.kernel("pull_back_bias")(
                numbers_grid(1, 1, own[1] * own[2] * own[3]), (BLOCK,),
                (scores.address, slopes.address, heads, rows, keys, *place, *finished, *own, *tail),
            )  # fmt: skip
        first = row, row, key
        poisoned = (n for x, at in zip(self._clean, first, strict=True) for n in x.poisoned(entry, at))
        self._pull_back(
            rows_grid(1, heads, rows), (BLOCK,),
            (
                scores.address, slopes.address if self._of_scores else 0, self._weights.address,
                self._gradients.address, rows, keys, *place, *finished, *poisoned,
                self._group, *tail,
            ),
        )  # fmt: skip

    def _add(self, product: Products, arrays: dict[str, Matrices], block: Block, scale: float) -> None:
        row, key, rows, keys, width = block.rows[0], block.keys[0], block.height, block.width, self._shape[3]
        if "dv" in arrays:
            product.put(
                self._weights, arrays["clean dout"].part(row), arrays["dv"].part(key), keys, self._values, rows,
                turned=_UPRIGHT, add=True,
            )  # fmt: skip
        if "dq" in arrays:
            product.put(
                self._gradients, arrays["clean k"].part(key), arrays["dq"].part(row), rows, width, keys,
                scale=scale, add=True,
            )  # fmt: skip
        if "dk" in arrays:
            product.put(
                self._gradients, arrays["clean q"].part(row), arrays["dk"].part(key), keys, width, rows,
                scale=scale, turned=_UPRIGHT, add=True,
            )  # fmt: skip


def _part_of_bias(dbias: Array, entry: int, block: Block, heads: int) -> tuple[int, ...]:
    """Of dbias [B, H, S, T] what belongs to a block: its address, and lengths and strides of heads, rows and keys."""
    batch, *further = (0 if length == 1 else step for length, step in zip(dbias.shape, steps(dbias), strict=True))
    lengths = heads, block.height, block.width
    due = (1 if own == 1 else length for own, length in zip(dbias.shape[1:], lengths, strict=True))
    corner = entry * batch + block.rows[0] * further[1] + block.keys[0] * further[2]
    return int(dbias.data.ptr) + corner * dbias.itemsize, *due, *further
