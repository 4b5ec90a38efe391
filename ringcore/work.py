"""The two kinds of work that ringcore does in its ring loop: attention, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import array_api_compat

from ringcore.arrays import add, key_index, put, row_index, slice_of, term_index
from ringcore.grouping import launches
from ringcore.merge import StandardArithmetic, empty_partial, fields, merge
from ringcore.partial import Partial, accumulation_dtype
from ringcore.pieces import pieces
from ringcore.positions import Mask, alibi_of, blocks, bounded, shown
from ringcore.protocols import Arithmetic, Kernels
from ringcore.values import Array, Blocks, Gradients, Move, Score, Spec, Tile, namespace

_STANDARD = StandardArithmetic()

Terms = dict[str, Array | None]
"""A tile's part of bias and of mask."""


class OnScores(NamedTuple):
    """What changes scores by where they are: bias, mask (an array or a function of positions), slopes of ALiBi [H]."""

    bias: Array | None = None
    mask: Array | Mask | None = None
    alibi: Array | None = None


_NOTHING = OnScores()

_WAITING = 2  # times all rows: so much may wait to be brought together in one pass


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
        gathers = self.fused and self.state is None and _gathers(arithmetic, q)
        self.waiting: list[tuple[tuple[Any, ...], Partial]] | None = [] if gathers else None

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
            if held + _rows_of(tile, self.q) <= _WAITING * math.prod(self.q.shape[:3]):
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
            self._visit(self.prefix, self.prefix_tiles, _NOTHING)

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


class BackwardWork:
    """q, dout and the row statistics stay, (k, v) visit, dq and dbias accumulate here, (dk, dv) are carried home.

    ``wide`` is ``out`` before its last cast. ``wanted`` names the gradients to compute, out of q, k, v, bias, sinks,
    prefix_k and prefix_v. ``replicated``, once the ring has run, holds this rank's shares of the last three.
    """

    def __init__(
        self, forward: ForwardWork, dout: Array, dlse: Array | None, out: Array, wide: Array,
        maximum: Array, total: Array, *, wanted: frozenset[str],
    ) -> None:  # fmt: skip
        self.forward, self.dout, self.wanted = forward, dout, wanted
        self.maximum, self.total = maximum, total
        self.delta: Array | None = None
        self.rows: dict[str, Array | None] = {}
        self.dq = None
        self.replicated: dict[str, Array] = {}
        self.sum = self._sum(forward.q)
        self.dbias = _zeros(forward.on_scores.bias) if "bias" in wanted else None
        if not forward.fused or "sinks" in wanted:
            self.delta = _delta(dout, wide, dlse)
        if forward.fused:
            self.rows = {"out": out, "lse": forward.arithmetic.finished_lse(maximum, total, math.inf), "dlse": dlse}
            return
        self.dq = _zeros(forward.q) if "q" in wanted else None

    def visiting(self) -> Blocks:
        """k [B, Hk, T, D] and v [B, Hk, T, E]."""
        return self.forward.visiting()

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        """k and v of the block's owner."""
        return self.forward.visiting_specs(move)

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        """dk and dv of the block's owner, those of them that are wanted."""
        return tuple(block_spec(x, self._carried_dtype(x), self.forward.lengths, move) for x in self._carried())

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        """Add to dq and dbias; the tiles' shares of dk and dv."""
        forward, wanted = self.forward, ("k" in self.wanted, "v" in self.wanted)
        if not forward.fused:
            return self._visit(block, tiles, wanted, forward.on_scores)
        ranks = len(forward.lengths)
        sums = self._visit_fused(block, tiles, wanted, forward.on_scores)
        share = tuple(total.take(last=ranks == 1) for total in sums)
        if block[0] is forward.k and ranks <= 2:  # one other share at most is added to it
            return share
        return tuple(
            namespace(x).astype(x, self._carried_dtype(like), copy=False)
            for x, like in zip(share, self._carried(), strict=True)
        )

    def _visit(self, block: Blocks, tiles: Sequence[Tile], wanted: tuple[bool, bool], on_scores: OnScores) -> Blocks:
        """Add to dq and dbias; dk and dv of the block, if they are wanted."""
        k, v = block
        dbias = None if on_scores.bias is None else self.dbias
        dk, dv = (_zeros(x) if want else None for x, want in zip(block, wanted, strict=True))
        for tile, terms in self.forward.launches(tiles, on_scores):
            rows, keys = row_index(tile), key_index(tile)
            bias_index = () if dbias is None else term_index(dbias, tile)
            places: tuple[tuple[Array | None, tuple[Any, ...]], ...]
            places = (self.dq, rows), (dk, keys), (dv, keys), (dbias, bias_index)
            into = Gradients(*(None if x is None else x[index] for x, index in places))
            gained = self._backward(k, v, tile, into, terms)
            if gained is not into:
                new = gained.dq, gained.dk, gained.dv, gained.dbias
                self.dq, dk, dv, dbias = (
                    x if x is None else put(x, index, value) for (x, index), value in zip(places, new, strict=True)
                )
        if dbias is not None:
            self.dbias = dbias
        return tuple(x for x in (dk, dv) if x is not None)

    def _visit_fused(
        self, block: Blocks, tiles: Sequence[Tile], wanted: tuple[bool, bool], on_scores: OnScores
    ) -> list[Sum]:
        """Add the gradients that the kernels return, as `_visit`."""
        k, v = block
        dbias = None if on_scores.bias is None else self.dbias
        dq, dk, dv = self.sum, self._sum(k), self._sum(v)
        for tile, terms in self.forward.launches(tiles, on_scores):
            dq.settle(coming=_rows_of(tile, self.forward.q))
            for total in (dk, dv):
                total.settle(coming=_keys_of(tile, k))
            rows, keys = row_index(tile), key_index(tile)
            bias_index = () if dbias is None else term_index(dbias, tile)
            into = Gradients(dbias=None if dbias is None else dbias[bias_index])
            gained = self._backward(k, v, tile, into, terms)
            if dbias is not None and gained.dbias is not into.dbias:
                self.dbias = dbias = put(dbias, bias_index, gained.dbias)
            wants = "q" in self.wanted, *wanted
            places = (dq, rows, gained.dq), (dk, keys, gained.dk), (dv, keys, gained.dv)
            for want, (total, index, part) in zip(wants, places, strict=True):
                if want:
                    total.add(index, part)
        return [total for total, want in zip((dk, dv), wanted, strict=True) if want]

    def _sum(self, like: Array) -> Sum:
        arithmetic: Any = self.forward.arithmetic
        gathers = self.forward.fused and _gathers(arithmetic, like)
        return Sum(like, arithmetic.summed_together if gathers else None)

    def _carried_dtype(self, x: Array) -> Any:
        narrow = travels_narrow(x, self.forward.kernels, len(self.forward.lengths))
        return x.dtype if narrow else accumulation_dtype(x)

    def _backward(self, k: Array, v: Array, tile: Tile, into: Gradients, terms: Terms) -> Gradients:
        forward = self.forward
        rows, keys = row_index(tile), key_index(tile)
        return forward.kernels.backward(
            self.dout[rows], forward.q[rows], k[keys], v[keys],
            self.maximum[rows], self.total[rows], None if self.delta is None else self.delta[rows],
            score=forward.score, tile=tile, into=into, **terms,
            **{name: None if x is None else x[rows] for name, x in self.rows.items()},
        )  # fmt: skip

    def _of_sinks(self) -> Array:
        """This rank's share of the gradient of sinks [H]: over its own rows, from the finished statistics alone."""
        xp, sinks = namespace(self.maximum), self.forward.sinks
        seen = self.total > 0
        gap = xp.astype(sinks, self.maximum.dtype)[:, None] - xp.where(seen, self.maximum, 0.0)
        weights = xp.where(seen, xp.exp(gap) / xp.where(seen, self.total, 1.0), 0.0)
        return -xp.sum(weights * self.delta, axis=(0, 2))

    def complete(self) -> None:
        """dq [B, H, S, D] is the sum over all blocks, to which the prefix belongs."""
        forward, names = self.forward, ("prefix_k", "prefix_v")
        if forward.prefix is not None:
            asked = forward.prefix, forward.prefix_tiles, (names[0] in self.wanted, names[1] in self.wanted), _NOTHING
            if forward.fused:
                shares = tuple(total.take() for total in self._visit_fused(*asked))
            else:
                shares = self._visit(*asked)
            self.replicated |= zip((name for name in names if name in self.wanted), shares, strict=True)
        if "sinks" in self.wanted:
            self.replicated["sinks"] = self._of_sinks()
        if forward.fused and "q" in self.wanted:
            self.dq = self.sum.take()

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        """The sums, in the order in which the block visited."""
        if rows is None:
            return tuple(_sum(mine, gained) for gained, mine in zip(arrived, share, strict=True))
        part = slice(None), slice(None), slice_of(rows), ...
        return tuple(add(whole, part, gained) for gained, whole in zip(arrived, share, strict=True))

    def _carried(self) -> list[Array]:
        return [x for name, x in (("k", self.forward.k), ("v", self.forward.v)) if name in self.wanted]


def travels_narrow(x: Array, kernels: Kernels, ranks: int) -> bool:
    """Whether a gradient of x stays in x's half type on its way home.

    Where two ranks share in it, what one kernel returned so is added once.
    """
    return ranks == 2 and kernels.capabilities.half_gradients and x.dtype != accumulation_dtype(x)


class Sum:
    """The sum of a gradient's parts, each of some of its rows.

    One part of all rows is taken as it is, also in a half type. The last part is added when the sum is taken: two in a
    half type are then rounded once, as their sum in the accumulation dtype would be.
    """

    def __init__(self, like: Array, together: Callable[..., Array | None] | None = None) -> None:
        self._like = like
        self._total: Array | None = None
        self._last: tuple[tuple[Any, ...], Array] | None = None
        self._together = together
        self._waiting: list[tuple[tuple[Any, ...], Array]] = []

    def settle(self, coming: int = 0) -> None:
        """Add what was kept for the last, which it is not. coming: how many rows the next part has."""
        if self._waiting:
            held = sum(math.prod(part.shape[:3]) for _, part in self._waiting)
            if held + coming > _WAITING * math.prod(self._like.shape[:3]):
                self._add_waiting()
        if self._last is not None:
            self._total = add(_widened(self._started()), *self._last)
            self._last = None

    def add(self, index: tuple[Any, ...], part: Array) -> None:
        """One part more, of the rows at ``index``."""
        if self._together is not None:
            self._waiting.append((index, part))
            return
        self.settle()
        if self._total is None and part.shape == self._like.shape:
            self._total = part
        else:
            self._last = index, part

    def take(self, last: bool = True) -> Array:
        """The sum, in the dtype of its parts if they are two at most, else in the accumulation dtype.

        last: nothing is added to it any more. Else it is in a half type only if it is one part. Parts that were brought
        together in one pass are rounded once, to the dtype of what the gradient is of.
        """
        if last and self._together is not None and len(self._waiting) > 2:
            found = self._together(self._like, self._waiting, self._like.dtype)
            if found is not None:
                self._waiting, self._total, self._together = [], found, None
                return found
        self._add_waiting()
        if self._last is None:
            return self._started()
        total, (_, part) = self._started(), self._last
        return add(total if last and total.dtype == part.dtype else _widened(total), *self._last)

    def _add_waiting(self) -> None:
        """From now on one is added after the other."""
        waiting, self._waiting, self._together = self._waiting, [], None
        for index, part in waiting:
            self.add(index, part)

    def _started(self) -> Array:
        return _zeros(self._like) if self._total is None else self._total


def block_spec(x: Array, dtype: Any, lengths: Sequence[int], move: Move) -> Spec:
    """What the rows of x's like that move look like, of an owner that has so many."""
    height = lengths[move.block] if move.rows is None else len(move.rows)
    return Spec((*x.shape[:2], height, x.shape[3]), x, dtype)


def _gathers(arithmetic: Arithmetic, x: Array) -> bool:
    """Whether many partials and parts of gradients on x's device are better brought together in one pass."""
    gathers = getattr(arithmetic, "gathers", None)
    return gathers is not None and bool(gathers(x))


def _rows_of(tile: Tile, x: Array) -> int:
    """How many rows of q, over batch entries and heads, the tile has."""
    return len(range(x.shape[0])[tile.batch]) * tile.heads * tile.height


def _keys_of(tile: Tile, x: Array) -> int:
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


def _delta(dout: Array, out: Array, dlse: Array | None) -> Array:
    """rowsum(dout * out) - dlse [B, H, S], in the accumulation dtype."""
    xp, dtype = namespace(out), accumulation_dtype(out)
    delta = xp.sum(xp.astype(out, dtype, copy=False) * xp.astype(dout, dtype), axis=-1)
    return delta if dlse is None else delta - xp.astype(dlse, dtype)


def _zeros(x: Array) -> Array:
    xp = namespace(x)
    return xp.zeros(x.shape, dtype=accumulation_dtype(x), device=array_api_compat.device(x))


def _widened(x: Array) -> Array:
    return namespace(x).astype(x, accumulation_dtype(x), copy=False)


def _sum(first: Array, second: Array) -> Array:
    first += second
    return first
