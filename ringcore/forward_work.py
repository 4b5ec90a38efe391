"""The first kind of work that ringcore does in its ring loop: attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ringcore.arrays import key_index, put, row_index, term_index
from ringcore.grouping import launches
from ringcore.merge import StandardArithmetic, empty_partial, fields, merge
from ringcore.partial import Partial, accumulation_dtype
from ringcore.pieces import pieces
from ringcore.positions import Mask, alibi_of, blocks, bounded, shown
from ringcore.protocols import Arithmetic, Kernels
from ringcore.sums import WAITING, gathers
from ringcore.values import Array, Blocks, Move, Score, Spec, Tile, namespace

_STANDARD = StandardArithmetic()

Terms = dict[str, Array | None]
"""A tile's part of bias and of mask."""


class OnScores(NamedTuple):
    """What changes scores by where they are: bias, mask (an array or a function of positions), slopes of ALiBi [H]."""

    bias: Array | None = None
    mask: Array | Mask | None = None
    alibi: Array | None = None


NOTHING = OnScores()


class ForwardWork:
    """q stays, (k, v) visit, the partial of q's rows accumulates here."""

    def __init__(
        self, q: Array, k: Array, v: Array, bias: Array | None, mask: Array | Mask | None, alibi: Array | None = None,
        sinks: Array | None = None, prefix: Blocks | None = None, prefix_tiles: Sequence[Tile] = (), *, score: Score,
        kernels: Kernels, lengths: Sequence[int], arithmetic: Arithmetic = _STANDARD,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.sinks = q, k, v, sinks
        self.prefix, self.prefix_tiles = prefix, prefix_tiles
        self.on_scores = OnScores(bias, mask, alibi)
        self.score, self.kernels, self.lengths, self.arithmetic = score, kernels, lengths, arithmetic
        # A sink is a key that every query of its head sees, without a value: the sums begin with it, once.
        self.state = None if sinks is None else _partial_of_sinks(sinks, q, v.shape[-1])
        self.last: tuple[tuple[Any, ...], Partial] | None = None
        # What fused kernels gave, with its rows, where the library can bring many together in one pass at the end.
        together = self.fused and self.state is None and gathers(arithmetic, q)
        self.waiting: list[tuple[tuple[Any, ...], Partial]] | None = [] if together else None

    def resume(self, state: Partial) -> None:
        """Begin with what q's rows saw before: arrays that may be written to, in the accumulation dtype."""
        self.state, self.waiting = state if self.state is None else merge(self.state, state), None

    def visiting(self) -> Blocks:
        """k [B, Hk, T, D] and v [B, Hk, T, E]."""
        return self.k, self.v

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        """k and v of the block's owner."""
        return tuple(block_spec(x, x.dtype, self.lengths, move) for x in (self.k, self.v))

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        """Nothing: what this work accumulates stays."""
        return ()

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        """Merge the tiles into the state of q's rows."""
        self._visit(block, tiles, self.on_scores)
        return ()

    def _visit(self, block: Blocks, tiles: Sequence[Tile], on_scores: OnScores) -> None:
        k, v = block
        for tile, terms in self.launches(tiles, on_scores):
            rows, whole = row_index(tile), _covers(self.q, tile)
            if not whole and self.state is None and self.waiting is None:
                self.state = empty_partial(self.q, v.shape[-1])
            if self.fused:
                self._visit_fused(k, v, tile, terms)
                continue
            state = self.state
            if whole or state is None:
                self.state = self._forward(k, v, tile, terms, state=state)
            else:
                piece = Partial(*(x[rows] for x in fields(state)))
                part = self._forward(k, v, tile, terms, state=piece)
                if part is not piece:
                    new = zip(fields(state), fields(part), strict=True)
                    self.state = Partial(*(put(x, rows, value) for x, value in new))

    def _visit_fused(self, k: Array, v: Array, tile: Tile, terms: Terms) -> None:
        """Merge what came before; the tile's own partial waits: the last one is merged as the sums are divided."""
        if self.waiting is not None:
            held = sum(math.prod(part.maximum.shape) for _, part in self.waiting)
            if held + rows_of(tile, self.q) <= WAITING * math.prod(self.q.shape[:3]):
                self.waiting.append((row_index(tile), self._forward(k, v, tile, terms)))
                return
            self._merge_waiting()  # there is some, for one tile has no more than all rows
        if self.state is not None and self.last is not None:
            self.state = self.arithmetic.merge_rows(self.state, *self.last)
            self.last = None
        part = self._forward(k, v, tile, terms)
        if self.state is None:
            self.state = part
        else:
            self.last = row_index(tile), part

    def _merge_waiting(self) -> None:
        """From now on one is merged after the other."""
        waiting, self.waiting = self.waiting or [], None
        if waiting and waiting[0][1].maximum.shape == self.q.shape[:3]:
            self.state = waiting.pop(0)[1]
        elif self.state is None and waiting:
            self.state = empty_partial(self.q, self.v.shape[-1])
        for rows, part in waiting:
            if self.state is not None and self.last is not None:
                self.state = self.arithmetic.merge_rows(self.state, *self.last)
            self.last = rows, part

    @property
    def fused(self) -> bool:
        """Whether the kernels know one tile alone."""
        return self.kernels.capabilities.fused

    def pieces(self, tiles: Sequence[Tile], on_scores: OnScores) -> Iterator[tuple[Tile, Terms]]:
        """The tiles in the form that the kernels take, each with its part of bias and mask."""
        mask, heads = on_scores.mask, self.q.shape[1]
        for tile in tiles:
            for part, masked in blocks(tile, mask) if callable(mask) else [(tile, mask is not None)]:
                here = on_scores if masked else on_scores._replace(mask=None)
                for small in [part] if on_scores.alibi is None else bounded(part, heads):
                    for piece in pieces(small, self.kernels.capabilities, masked=masked):
                        yield piece, self._terms(here, piece)

    def launches(self, tiles: Sequence[Tile], on_scores: OnScores) -> Iterable[tuple[Tile, Terms]]:
        """What the kernels are called with: pieces, or many of them as the parts of one tile."""
        if not self.kernels.capabilities.parts or any(x is not None for x in on_scores):
            return self.pieces(tiles, on_scores)
        return [(tile, {"bias": None, "mask": None}) for tile in launches(tiles, self.kernels.capabilities)]

    def _terms(self, on_scores: OnScores, tile: Tile) -> Terms:
        bias, mask, alibi = on_scores
        if callable(mask):
            mask = shown(mask, tile, self.q, *self.q.shape[:2])
        elif mask is not None:
            mask = mask[term_index(mask, tile)]
        if bias is not None:
            bias = bias[term_index(bias, tile)]
        if alibi is not None:
            ramp = alibi_of(alibi, tile, accumulation_dtype(self.q))
            bias = ramp if bias is None else ramp + namespace(bias).astype(bias, ramp.dtype)
        return {"bias": bias, "mask": mask}

    def _forward(self, k: Array, v: Array, tile: Tile, terms: Terms, **state: Partial | None) -> Partial:
        rows, keys = row_index(tile), key_index(tile)
        return self.kernels.forward(self.q[rows], k[keys], v[keys], score=self.score, tile=tile, **terms, **state)

    def complete(self) -> None:
        """Merge the prefix, which nobody sent; the last partial is merged by `finish`."""
        if self.prefix is not None:
            self._visit(self.prefix, self.prefix_tiles, NOTHING)

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        """Never called: nothing is carried."""
        raise NotImplementedError

    def partial(self) -> Partial:
        """What q's rows saw so far, before the division, in the accumulation dtype; from now on the caller's alone."""
        self._merge_waiting()
        state, last, self.state, self.last = self.state, self.last, None, None
        state = state or empty_partial(self.q, self.v.shape[-1])
        return (state if last is None else self.arithmetic.merge_rows(state, *last)).widened

    def finish(self, dtype: Any) -> tuple[Array, Array, Array]:
        """Of q's rows over all keys that visited: out [B, H, S, E] in ``dtype``, maximum and total [B, H, S].

        From now on they are the caller's alone.
        """
        if self.waiting is not None and len(self.waiting) > 2:
            gathering: Any = self.arithmetic
            found: tuple[Array, Array, Array] | None
            found = gathering.finished_together(self.q, self.v.shape[-1], self.waiting, dtype)
            if found is not None:
                self.waiting = None
                return found
        self._merge_waiting()
        state, last, self.state, self.last = self.state, self.last, None, None
        return self.arithmetic.finished(state or empty_partial(self.q, self.v.shape[-1]), dtype, last)


def block_spec(x: Array, dtype: Any, lengths: Sequence[int], move: Move) -> Spec:
    """What the rows of x's like that move look like, of an owner that has so many."""
    height = lengths[move.block] if move.rows is None else len(move.rows)
    return Spec((*x.shape[:2], height, x.shape[3]), x, dtype)


def rows_of(tile: Tile, x: Array) -> int:
    """How many rows of q, over batch entries and heads, the tile has."""
    return len(range(x.shape[0])[tile.batch]) * tile.heads * tile.height


def keys_of(tile: Tile, x: Array) -> int:
    """How many keys, over batch entries and heads, the tile has."""
    return len(range(x.shape[0])[tile.batch]) * len(range(x.shape[1])[tile.k_heads]) * tile.width


def _covers(x: Array, tile: Tile) -> bool:
    wanted = tile.batch, tile.q_heads, tile.rows
    return all(range(length)[part] == range(length) for length, part in zip(x.shape[:3], wanted, strict=True))


def _partial_of_sinks(sinks: Array, q: Array, width: int) -> Partial:
    """What q's rows have seen once they saw their head's sink: its score, and no value."""
    xp, empty = namespace(q), empty_partial(q, width)
    score = xp.astype(sinks, empty.maximum.dtype)[:, None] + xp.zeros_like(empty.total)
    return Partial(empty.weighted, score, xp.astype(score != -math.inf, empty.total.dtype))
