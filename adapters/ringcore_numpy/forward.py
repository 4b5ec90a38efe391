"""The forward pass over one tile, by blocks of query rows and keys.

The running reference of each row is one more column of q against a column of ones in k, so that the
product itself gives score - reference. The reference follows the maximum lazily, only when some score exceeds
it by more than ``_SLACK``; it cancels, so the result stays exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ringcore import Array, Band, Partial, Score
from ringcore_numpy.threads import Job, Scratch
from ringcore_numpy.tiles import Careful, Span, accumulation, add_edges, blocks, guarded_product, overlap

_ROWS = 528
_STEP = 176  # rows of a piece where an edge of the band cuts the tile: less of it is computed in vain
_KEYS = 1552  # a row of scores of 4096 bytes would put every row into the same few sets of the cache
_STRIP = 6  # blocks of rows that share one prepared block of keys
_FEWEST = 8  # tasks below which blocks are made smaller; fixed, so that results do not depend on the threads
_SLACK = 8.0  # exp(8) leaves float32 sums of any length far from overflow
_COARSE = 64.0  # a reference this far off costs digits of the difference: the product is taken again
_LARGEST = 65536.0  # references beyond it (a bias of finfo.min before) would drown the scores


@dataclass(frozen=True)
class _Block:
    """Rows of one query head, and the columns that some of them see."""

    head: int
    rows: Span
    columns: Span


@dataclass(frozen=True)
class _Strip:
    """Blocks that read the same key head, computed by one thread."""

    batch: int
    k_head: int
    blocks: tuple[_Block, ...]

    @property
    def area(self) -> int:
        return sum((b.rows[1] - b.rows[0]) * (b.columns[1] - b.columns[0]) for b in self.blocks)


@dataclass(frozen=True)
class _Rows:
    """The running sums of some rows, in scratch memory: q [n, D + 1], weighted [n, E], the others [n]."""

    q: Array
    weighted: Array
    total: Array
    reference: Array
    top: Array  # the largest score seen, against the reference; may lag behind by the slack

    def __getitem__(self, rows: slice) -> _Rows:
        return _Rows(self.q[rows], self.weighted[rows], self.total[rows], self.reference[rows], self.top[rows])


class Forward:
    """One call: its tasks, the work of each, and the result. among: how many such calls share out their tasks."""

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        score: Score,
        band: Band,
        bias: Array | None,
        mask: Array | None,
        state: Partial | None,
        among: int = 1,
    ) -> None:
        self._fewest = max(1, _FEWEST // among)
        self._q, self._k, self._v, self._score = q, k, v, score
        self._dtype = accumulation(q)
        batch, heads, height = q.shape[:3]
        self._k_heads, self._width, self._values = v.shape[1:]
        self._band = band.clipped(height, self._width)
        self._plain = bias is None and mask is None and score.softcap is None
        self._careful = Careful(score, self._band, bias, mask, _STEP)
        self._keys = _KEYS if self._dtype is np.float32 else _KEYS // 2
        self._ones = np.ones(self._keys, dtype=self._dtype)
        self._state = state
        if state is None:
            shape = (batch, heads, height)
            weighted, maximum, total = (np.empty(s, self._dtype) for s in ((*shape, self._values), shape, shape))
            self.result = Partial(weighted, maximum, total)
        else:
            self.result = state
        self._strips = self._plan()
        self.tasks = len(self._strips)

    def _plan(self) -> list[_Strip]:
        """The strips, longest first."""
        batch, heads, height, _ = self._q.shape
        if 0 in (batch, heads, height):
            return []
        rows = _ROWS
        while rows > 32 and batch * heads * -(-height // rows) < self._fewest:
            rows //= 2
        left = batch * heads * -(-height // rows)
        group = heads // self._k_heads
        strips = []
        for b in range(batch):
            for k_head in range(self._k_heads):
                cut = [
                    _Block(k_head * group + member, span, self._band.columns(*span, self._width))
                    for span in blocks((0, height), rows)
                    for member in range(group)
                ]
                if self._state is not None:  # what sees nothing stays as it is
                    cut = [block for block in cut if block.columns[0] < block.columns[1]]
                while cut:  # ever shorter strips, so that the threads end together
                    size = max(1, min(_STRIP, left // self._fewest))
                    strips.append(_Strip(b, k_head, tuple(cut[:size])))
                    del cut[:size]
                    left -= size
        return sorted(strips, key=lambda strip: -strip.area)

    def work(self, task: int, scratch: Scratch, job: Job) -> None:
        """Compute one strip. Results are written at its end, so a poisoned block can be done again."""
        strip = self._strips[task]
        again = self._strip(strip, strip.blocks, scratch, job, careful=not self._plain)
        if again:
            self._strip(strip, again, scratch, job, careful=True)

    def _strip(
        self, strip: _Strip, chosen: tuple[_Block, ...], scratch: Scratch, job: Job, *, careful: bool
    ) -> tuple[_Block, ...]:
        """Compute some blocks of a strip; gives those that need more care than they were given."""
        depth, values, dtype = self._q.shape[3], self._values, self._dtype
        pairs = []
        again = []
        for slot, block in enumerate(chosen):
            height = block.rows[1] - block.rows[0]
            q = scratch.take(f"q{slot}", (height, depth + 1), dtype)
            weighted = scratch.take(f"weighted{slot}", (height, values), dtype)
            rows = _Rows(q, weighted, *scratch.take(f"rows{slot}", (3, height), dtype))
            if self._begin(rows, strip.batch, block) or careful:
                pairs.append((block, rows))
            else:
                again.append(block)
        seen = [block.columns for block, _ in pairs if block.columns[0] < block.columns[1]]
        span = (min(s[0] for s in seen), max(s[1] for s in seen)) if seen else (0, 0)
        for keys in blocks(span, self._keys):
            k, v = self._load(strip, keys, scratch)
            for block, rows in pairs:
                for piece, columns in self._pieces(block.rows, overlap(block.columns, keys)):
                    job.check()
                    part = slice(columns[0] - keys[0], columns[1] - keys[0])
                    of = rows[piece[0] - block.rows[0] : piece[1] - block.rows[0]]
                    if careful:
                        at = (strip.batch, block.head)
                        self._careful_tile(of, at, piece, columns, k[:, part], v[part], scratch)
                    else:
                        self._tile(of, piece, columns, k[:, part], v[part], scratch)
        again += [block for block, rows in pairs if not self._end(rows, strip.batch, block, careful=careful)]
        return tuple(again)

    def _pieces(self, rows: Span, columns: Span) -> Iterator[tuple[Span, Span]]:
        """A tile as it is computed: whole, or in steps of rows with their own columns where the band cuts it."""
        lo, hi = self._band.lo, self._band.hi
        whole = (hi is None or columns[1] <= rows[0] + hi + 1) and (lo is None or columns[0] >= rows[1] - 1 + lo)
        for piece in [rows] if whole else blocks(rows, _STEP):
            seen = overlap(self._band.columns(*piece, self._width), columns)
            if seen[0] < seen[1]:
                yield piece, seen

    def _begin(self, rows: _Rows, batch: int, block: _Block) -> bool:
        """Take q and the state up; False if the references are too large for the fast tile."""
        at = (batch, block.head, slice(*block.rows))
        depth = self._q.shape[3]
        rows.q[:, :depth] = self._q[at]
        rows.q[:, :depth] *= self._score.scale
        rows.total.fill(0)
        rows.reference.fill(0)
        rows.top.fill(-np.inf)
        if self._state is None:
            rows.weighted.fill(0)
        else:
            maximum, total = self._state.maximum[at], self._state.total[at]
            seen = (maximum != -np.inf) & (total != 0)
            np.copyto(rows.total, total, where=seen)
            np.copyto(rows.reference, maximum, where=seen)
            np.copyto(rows.top, 0, where=seen)
            rows.weighted[...] = self._state.weighted[at]
            if not seen.all():
                rows.weighted[~seen] = 0
        np.negative(rows.reference, out=rows.q[:, depth])
        return bool(np.max(np.abs(rows.reference)) <= _LARGEST)

    def _load(self, strip: _Strip, keys: Span, scratch: Scratch) -> tuple[Array, Array]:
        """A block of k, transposed, with a row of ones [D + 1, m], and of v [m, E]."""
        at = (strip.batch, strip.k_head, slice(*keys))
        width, depth = keys[1] - keys[0], self._k.shape[3]
        k = scratch.take("k", (depth + 1, width), self._dtype)
        k[:depth] = self._k[at].T
        k[depth] = 1
        v = self._v[at]
        if v.dtype != self._dtype or not v.flags.c_contiguous or not v.flags.aligned:
            v = scratch.take("v", v.shape, self._dtype)
            v[...] = self._v[at]
        return k, v

    def _tile(self, rows: _Rows, at: Span, columns: Span, k: Array, v: Array, scratch: Scratch) -> None:
        """Add one block of keys, none of which has a bias or a mask beside the band."""
        scores = scratch.take("scores", (rows.q.shape[0], k.shape[1]), self._dtype)
        np.matmul(rows.q, k, out=scores)
        add_edges(scores, self._band, at, columns, _STEP)
        # Written so that NaN fails, too. Most rows find a score near their largest in their first block.
        settled = np.minimum.reduce(rows.top) >= -_SLACK
        if not (settled and np.maximum.reduce(scores, axis=None) <= _SLACK):
            self._follow(rows, at, columns, k, scores)
        np.exp(scores, out=scores)
        self._accumulate(rows, scores, v, None, scratch)

    def _follow(self, rows: _Rows, at: Span, columns: Span, k: Array, scores: Array) -> None:
        """Look up every row's top, and move the references of rows whose top left the slack."""
        top = np.maximum(rows.top, np.maximum.reduce(scores, axis=1))
        move = np.where(np.isfinite(top) & (np.abs(top) > _SLACK), top, 0)
        farthest = np.max(np.abs(move))
        if farthest > 0:
            rows.reference[:] += move
            np.negative(rows.reference, out=rows.q[:, -1])
            if farthest > _COARSE:
                np.matmul(rows.q, k, out=scores)
                add_edges(scores, self._band, at, columns, _STEP)
                np.maximum(rows.top - move, np.maximum.reduce(scores, axis=1), out=top)
            else:
                scores -= move[:, None]
                top -= move
            # A row moves down only before it has seen anything: its sums are 0, and exp could overflow.
            _shrink(rows, np.exp(-np.maximum(move, 0)))
        rows.top[:] = top

    def _careful_tile(
        self, rows: _Rows, at: tuple[int, int], span: Span, columns: Span, k: Array, v: Array, scratch: Scratch
    ) -> None:
        """Add one block of keys, whatever its bias, mask, softcap and poison."""
        scores = scratch.take("scores", (rows.q.shape[0], k.shape[1]), self._dtype)
        np.matmul(rows.q[:, :-1], k[:-1], out=scores)
        self._careful.finish(scores, at, span, columns, scratch)
        visible = None
        if not np.isfinite(np.sum(v)):
            visible = self._careful.visible(scores.shape, at, span, columns)
        old = np.where(rows.top == -np.inf, -np.inf, rows.reference)
        new = np.maximum(old, np.maximum.reduce(scores, axis=1))
        base = np.where(new == -np.inf, 0, new)
        _shrink(rows, np.exp(old - base))
        rows.reference[:] = base
        rows.top[:] = np.where(new == -np.inf, -np.inf, 0)
        scores -= base[:, None]
        np.exp(scores, out=scores)
        self._accumulate(rows, scores, v, visible, scratch)

    def _accumulate(self, rows: _Rows, weights: Array, v: Array, visible: Array | None, scratch: Scratch) -> None:
        rows.total[:] += np.matmul(weights, self._ones[: v.shape[0]])
        product = scratch.take("product", rows.weighted.shape, self._dtype)
        guarded_product(weights, v, visible, product)
        rows.weighted[:] += product

    def _end(self, rows: _Rows, batch: int, block: _Block, *, careful: bool) -> bool:
        """Write the rows; False, with nothing written, if poison asks for the careful way."""
        if not careful and not np.isfinite(np.sum(rows.weighted) + np.sum(rows.total)):
            return False
        seen = rows.top != -np.inf
        factor = np.exp(-np.where(seen, rows.top, 0))
        _shrink(rows, factor)
        at = (batch, block.head, slice(*block.rows))
        self.result.maximum[at] = np.where(seen, rows.reference + rows.top, -np.inf)
        self.result.total[at] = rows.total
        self.result.weighted[at] = rows.weighted
        return True


def _shrink(rows: _Rows, factor: Array) -> None:
    rows.total[:] *= factor
    rows.weighted[:] *= factor[:, None]
