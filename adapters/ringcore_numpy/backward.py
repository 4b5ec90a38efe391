"""The backward pass over one tile, by blocks of keys and query rows.

Each thread owns a block of keys with its dk and dv; the shares of dq (and dbias) that different blocks of keys give
to the same rows are added in the order of the blocks, so that the sums are the same for any number of threads.

The weights are exp(s - maximum) / total, with the division moved into dout and delta. The maximum and delta are one
more column of q and dout against columns of ones in k and v: both products come with their difference already taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringcore import Array, Band, Gradients, Score
from ringcore_numpy.bias_gradient import BiasGradient
from ringcore_numpy.order import EVERYTHING, Order
from ringcore_numpy.threads import Job, Scratch
from ringcore_numpy.tiles import Careful, Span, accumulation, add_edges, blocks, guarded_product, overlap

# Rows of 2048 bytes would share few sets of the cache, hence no powers of two.
_LARGE, _SMALL = 528, 264  # sides of a tile, and where a narrow window would leave most of it hidden
_KEYS = 1056  # keys of a task: several tiles share each prepared block of rows
_FEWEST = 8  # tasks below which they are made smaller; fixed, so that results do not depend on the threads


@dataclass(frozen=True)
class _Task:
    """A block of keys of one key head."""

    batch: int
    k_head: int
    keys: Span
    rows: Span


@dataclass(frozen=True)
class _Keys:
    """A part of a task's keys: k times the scale [m, D + 1] and v [m, E + 1] with columns of ones, dk and dv."""

    span: Span
    k: Array
    v: Array
    dk: Array
    dv: Array
    finite: bool


@dataclass(frozen=True)
class _Rows:
    """Prepared rows of one query head: q and -maximum [n, D + 1], dout and -delta, both over total, [n, E + 1]."""

    head: int
    span: Span
    q: Array
    dout: Array
    dead: Array | None
    finite: bool


class Backward:
    """One call: its tasks, and the work of each. Gradients are added into the buffers of ``into``.

    among: how many such calls share out their tasks.
    """

    def __init__(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        maximum: Array,
        total: Array,
        delta: Array,
        *,
        score: Score,
        band: Band,
        bias: Array | None,
        mask: Array | None,
        into: Gradients,
        among: int = 1,
    ) -> None:
        self._fewest = max(1, _FEWEST // among)
        self._dout, self._q, self._k, self._v = dout, q, k, v
        self._maximum, self._total, self._delta = maximum, total, delta
        self._score, self._into = score, into
        self._dtype = accumulation(q)
        batch, heads, self._height, self._depth = q.shape
        self._k_heads, self._width, self._values = v.shape[1:]
        self._group = heads // self._k_heads if self._k_heads else 1
        self._band = band.clipped(self._height, self._width)
        lo, hi = self._band.lo, self._band.hi
        self._side = _SMALL if lo is not None and hi is not None and hi - lo < 2 * _LARGE else _LARGE
        self._plain = bias is None and mask is None and score.softcap is None and into.dbias is None
        self._careful = Careful(score, self._band, bias, mask, self._side)
        wanted = any(x is not None for x in (into.dq, into.dk, into.dv, into.dbias))
        self._tasks = self._plan(batch) if wanted and heads and self._height else []
        self._order = Order([(task.batch, task.k_head) for task in self._tasks])
        self.tasks = len(self._tasks)

    def _plan(self, batch: int) -> list[_Task]:
        """The tasks, block by block of keys: with an upper bound the later ones are shorter.

        Heads come in turn, so that threads seldom wait for each other to add to the same rows.
        """
        length = _KEYS
        while length > 128 and batch * self._k_heads * -(-self._width // length) < self._fewest:
            length //= 2
        tasks = [
            _Task(b, head, keys, self._band.rows(*keys, self._height))
            for keys in blocks((0, self._width), length)
            for b in range(batch)
            for head in range(self._k_heads)
        ]
        return [task for task in tasks if task.rows[0] < task.rows[1]]

    def work(self, number: int, scratch: Scratch, job: Job) -> None:
        """Compute the gradients that one block of keys gives and gets."""
        task = self._tasks[number]
        parts = [self._prepare_keys(task, span, scratch) for span in blocks(task.keys, self._side)]
        heads = range(task.k_head * self._group, (task.k_head + 1) * self._group)
        bias = None
        if self._into.dbias is not None:
            bias = BiasGradient(self._into.dbias, task.batch, heads, task.keys, scratch)
        first = task.rows[0] // self._side
        for index, rows in enumerate(blocks((first * self._side, task.rows[1]), self._side), start=first):
            for position, head in enumerate(heads, start=index * self._group):
                job.check()
                prepared = self._prepare_rows(task, head, rows, scratch)
                if bias is not None and bias.by_row:  # heads, keys or batches may share its rows
                    self._order.wait(number, (index + 1) * self._group - 1, job, every_head=True)
                dq = self._rows(task, prepared, parts, bias, scratch)
                if dq is not None and self._into.dq is not None:
                    self._order.wait(number, position, job)
                    self._into.dq[task.batch, head, slice(*rows)] += dq
                self._order.passed(number, position)
        self._finish(task, parts)
        if bias is not None and not bias.by_row:
            self._order.wait(number, EVERYTHING, job, every_head=True)
            bias.flush()
        self._order.passed(number, EVERYTHING)

    def _prepare_keys(self, task: _Task, span: Span, scratch: Scratch) -> _Keys:
        at = (task.batch, task.k_head, slice(*span))
        width, start = span[1] - span[0], span[0] - task.keys[0]
        k = scratch.take(f"k{start}", (width, self._depth + 1), self._dtype)
        k[:, :-1] = self._k[at]
        k[:, :-1] *= self._score.scale
        k[:, -1] = 1
        v = scratch.take(f"v{start}", (width, self._values + 1), self._dtype)
        v[:, :-1] = self._v[at]
        v[:, -1] = 1
        dk = scratch.take(f"dk{start}", (width, self._depth), self._dtype)
        dv = scratch.take(f"dv{start}", (width, self._values), self._dtype)
        dk.fill(0)
        dv.fill(0)
        return _Keys(span, k, v, dk, dv, _moderate(k) and _moderate(v))

    def _prepare_rows(self, task: _Task, head: int, span: Span, scratch: Scratch) -> _Rows:
        at = (task.batch, head, slice(*span))
        height = span[1] - span[0]
        maximum, total = self._maximum[at], self._total[at]
        q = scratch.take("q", (height, self._depth + 1), self._dtype)
        q[:, :-1] = self._q[at]
        # Not np.negative: NumPy 2.4's is wrong from strided float32 into strided memory.
        np.multiply(maximum, -1.0, out=q[:, -1])
        inverse = np.reciprocal(total, dtype=self._dtype)
        dout = scratch.take("dout", (height, self._values + 1), self._dtype)
        dout[:, :-1] = self._dout[at]
        dout[:, :-1] *= inverse[:, None]
        np.multiply(self._delta[at], -inverse, out=dout[:, -1])
        dead = (maximum == -np.inf) | (total == 0)
        if not dead.any():
            dead = None
        else:
            q[dead] = 0
            dout[dead] = 0
        return _Rows(head, span, q, dout, dead, _moderate(q) and _moderate(dout))

    def _rows(
        self, task: _Task, rows: _Rows, parts: list[_Keys], bias: BiasGradient | None, scratch: Scratch
    ) -> Array | None:
        """All tiles of a block of rows; gives their share of dq [n, D], if wanted."""
        dq = None
        visible = self._band.columns(*rows.span, self._width)
        for keys in parts:
            columns = overlap(visible, keys.span)
            if columns[0] >= columns[1]:
                continue
            tile = self._tile if self._plain and rows.finite and keys.finite else self._careful_tile
            share = tile(task, rows, keys, columns, bias, scratch, dq is None)
            if dq is None:
                dq = share
            elif share is not None:
                dq += share
        return dq

    def _tile(
        self,
        task: _Task,
        rows: _Rows,
        keys: _Keys,
        columns: Span,
        bias: BiasGradient | None,
        scratch: Scratch,
        first: bool,
    ) -> Array | None:
        """One tile of finite numbers under a band alone; gives its share of dq [n, D]."""
        part = slice(columns[0] - keys.span[0], columns[1] - keys.span[0])
        k, v = keys.k[part], keys.v[part]
        shape = (rows.q.shape[0], k.shape[0])
        weights = scratch.take("weights", shape, self._dtype)
        np.matmul(rows.q, k.T, out=weights)
        add_edges(weights, self._band, rows.span, columns, self._side)
        np.exp(weights, out=weights)
        if self._into.dv is not None:
            product = scratch.take("product", (shape[1], self._values), self._dtype)
            keys.dv[part] += np.matmul(weights.T, rows.dout[:, :-1], out=product)
        if self._into.dq is None and self._into.dk is None:
            return None
        slopes = scratch.take("slopes", shape, self._dtype)
        np.matmul(rows.dout, v.T, out=slopes)
        slopes *= weights
        if self._into.dk is not None:
            product = scratch.take("product", (shape[1], self._depth), self._dtype)
            keys.dk[part] += np.matmul(slopes.T, rows.q[:, :-1], out=product)
        if self._into.dq is None:
            return None
        share = scratch.take("dq" if first else "product", (shape[0], self._depth), self._dtype)
        return np.matmul(slopes, k[:, :-1], out=share)

    def _careful_tile(
        self,
        task: _Task,
        rows: _Rows,
        keys: _Keys,
        columns: Span,
        bias: BiasGradient | None,
        scratch: Scratch,
        first: bool,
    ) -> Array | None:
        """One tile, whatever its bias, mask, softcap and poison; gives its share of dq [n, D]."""
        part = slice(columns[0] - keys.span[0], columns[1] - keys.span[0])
        k, v, at = keys.k[part], keys.v[part], (task.batch, rows.head)
        q, dout = rows.q[:, :-1], rows.dout[:, :-1]
        shape = (q.shape[0], k.shape[0])
        weights = scratch.take("weights", shape, self._dtype)
        np.matmul(q, k[:, :-1].T, out=weights)
        slope = self._careful.finish(weights, at, rows.span, columns, scratch, slope=True)
        if rows.finite and keys.finite:
            visible = weights != -np.inf
        else:
            visible = self._careful.visible(shape, at, rows.span, columns)
        if rows.dead is not None:
            visible[rows.dead] = False
        weights += rows.q[:, -1:]
        np.exp(weights, out=weights)
        hidden = ~visible
        np.copyto(weights, 0, where=hidden)
        if self._into.dv is not None:
            product = scratch.take("product", (shape[1], self._values), self._dtype)
            guarded_product(weights.T, dout, visible.T, product)
            keys.dv[part] += product
        if self._into.dq is None and self._into.dk is None and self._into.dbias is None:
            return None
        slopes = scratch.take("slopes", shape, self._dtype)
        np.matmul(rows.dout, v.T, out=slopes)
        slopes *= weights
        np.copyto(slopes, 0, where=hidden)
        if bias is not None:
            bias.add(rows.head, rows.span, columns, slopes)
        if slope is not None:
            slopes *= slope
            np.copyto(slopes, 0, where=hidden)
        if self._into.dk is not None:
            product = scratch.take("product", (shape[1], self._depth), self._dtype)
            guarded_product(slopes.T, q, visible.T, product)
            keys.dk[part] += product
        if self._into.dq is None:
            return None
        share = scratch.take("dq" if first else "product", (shape[0], self._depth), self._dtype)
        guarded_product(slopes, k[:, :-1], visible, share)
        return share

    def _finish(self, task: _Task, parts: list[_Keys]) -> None:
        """Add dk and dv, which no other task touches."""
        for keys in parts:
            at = (task.batch, task.k_head, slice(*keys.span))
            if self._into.dk is not None:
                np.multiply(keys.dk, self._score.scale, out=keys.dk)
                self._into.dk[at] += keys.dk
            if self._into.dv is not None:
                self._into.dv[at] += keys.dv


def _moderate(x: Array) -> bool:
    """Whether no number is NaN or inf, and none so large that a product with another such array could be."""
    flat = x.reshape(-1)
    return bool(np.isfinite(np.dot(flat, flat)))
