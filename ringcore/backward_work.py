"""The second kind of work that ringcore does in its ring loop: the gradients of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ringcore.arrays import add, key_index, put, row_index, slice_of, term_index
from ringcore.forward_work import NOTHING, ForwardWork, OnScores, Terms, block_spec, keys_of, rows_of
from ringcore.partial import accumulation_dtype
from ringcore.protocols import Kernels
from ringcore.sums import Sum, gathers, zeros
from ringcore.values import Array, Blocks, Gradients, Move, Spec, Tile, namespace


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
        self.dbias = zeros(forward.on_scores.bias) if "bias" in wanted else None
        if not forward.fused or "sinks" in wanted:
            self.delta = _delta(dout, wide, dlse)
        if forward.fused:
            self.rows = {"out": out, "lse": forward.arithmetic.finished_lse(maximum, total, math.inf), "dlse": dlse}
            return
        self.dq = zeros(forward.q) if "q" in wanted else None

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
        dk, dv = (zeros(x) if want else None for x, want in zip(block, wanted, strict=True))
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
            dq.settle(coming=rows_of(tile, self.forward.q))
            for total in (dk, dv):
                total.settle(coming=keys_of(tile, k))
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
        together = self.forward.fused and gathers(arithmetic, like)
        return Sum(like, arithmetic.summed_together if together else None)

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
            asked = forward.prefix, forward.prefix_tiles, (names[0] in self.wanted, names[1] in self.wanted), NOTHING
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


def _delta(dout: Array, out: Array, dlse: Array | None) -> Array:
    """rowsum(dout * out) - dlse [B, H, S], in the accumulation dtype."""
    xp, dtype = namespace(out), accumulation_dtype(out)
    delta = xp.sum(xp.astype(out, dtype, copy=False) * xp.astype(dout, dtype), axis=-1)
    return delta if dlse is None else delta - xp.astype(dlse, dtype)


def _sum(first: Array, second: Array) -> Array:
    first += second
    return first
