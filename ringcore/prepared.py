"""A checked call on its arrays: forward once, backward as often as one likes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import array_api_compat

from ringcore.arguments import Arguments
from ringcore.arrays import put
from ringcore.backward_work import BackwardWork
from ringcore.discovery import find_arithmetic
from ringcore.forward_work import ForwardWork
from ringcore.inputs import swap_axes, within_range
from ringcore.partial import Partial, accumulation_dtype
from ringcore.positions import OfHeads
from ringcore.protocols import Kernels
from ringcore.replicated import add_all
from ringcore.session import Session, Side, split_term
from ringcore.values import Array, Blocks, Tile, namespace


@dataclass(frozen=True)
class Result:
    """What forward found for the rows of this caller.

    out [B, H, S, E] in q's dtype, and ``wide``: the same before the last cast, where it was kept; maximum and total
    [B, H, S] of the finished rows.
    """

    out: Array
    wide: Array
    maximum: Array
    total: Array

    @property
    def lse(self) -> Array:
        """[B, H, S], natural log."""
        return Partial(self.wide, self.maximum, self.total).lse


class Prepared:
    """A checked call that can run: forward once, backward as often as one likes."""

    def __init__(self, arguments: Arguments, session: Session, kernels: Kernels) -> None:
        self.arguments, self.session, self._xp = arguments, session, namespace(arguments.q)
        deal = session.deal
        qs = [part for (part,) in session.split("q", (arguments.q,))]
        keys = session.split("k", (arguments.k, arguments.v))
        bias, sinks = (within_range(term, arguments.q) for term in (arguments.bias, arguments.sinks))
        terms = bias, arguments.mask
        biases, masks = (split_term(session, term, len(qs)) for term in terms)
        heads, key_heads = (session.heads(x.shape[1]) for x in (arguments.q, arguments.k))
        if arguments.mask_of is not None:
            some = heads.stop - heads.start < arguments.q.shape[1]
            masks = [OfHeads(arguments.mask_of, heads, arguments.q.shape[1]) if some else arguments.mask_of] * len(qs)
        prefix: Blocks | None = None
        tiles: list[tuple[Tile, ...]] = [()] * len(qs)
        if arguments.prefix_k is not None and arguments.prefix_v is not None:
            prefix = arguments.prefix_k[:, key_heads, ...], arguments.prefix_v[:, key_heads, ...]
            tiles = [deal.prefix_tiles(rank, arguments.prefix_k.shape[2]) for rank in session.ranks]
        alibi, sinks = (None if x is None else x[heads] for x in (arguments.alibi, sinks))
        score = replace(arguments.score, first_head=heads.start) if heads.start else arguments.score
        arithmetic = find_arithmetic(arguments.q)
        self._works = [
            ForwardWork(
                q, k, v, bias, mask, alibi=alibi, sinks=sinks, prefix=prefix, prefix_tiles=before,
                score=score, kernels=kernels, lengths=deal.k_layout.lengths, arithmetic=arithmetic,
            )
            for q, (k, v), bias, mask, before in zip(qs, keys, biases, masks, tiles, strict=True)
        ]  # fmt: skip

    def resume(self, partial: Partial) -> None:
        """Let forward begin with what these queries saw before; ``partial`` stays as it is."""
        wide = partial.widened
        with self.session.guarded():
            parts = self.session.split("q", (wide.weighted, wide.maximum, wide.total))
            for work, own in zip(self._works, parts, strict=True):
                work.resume(Partial(*(self._xp.asarray(x, copy=True) for x in own)))

    def forward(self, keep_wide: bool = False) -> Result:
        """Run the ring. keep_wide: ``wide`` of the result is in the accumulation dtype, which `backward` reads."""
        with self.session.guarded():
            return self._forward(keep_wide)

    def partial(self) -> Partial:
        """Run the ring; what these queries saw, before the division."""
        session = self.session
        with session.guarded():
            session.run(self._works)
            found = [work.partial() for work in self._works]
            weighted, maximum, total = session.join("q", [(x.weighted, x.maximum, x.total) for x in found])
            return Partial(weighted, maximum, total, self.arguments.score)

    def backward(self, result: Result, dout: Array, dlse: Array | None, wrt: Sequence[str]) -> tuple[Array, ...]:
        """The gradients of the names in ``wrt``, given those of out (caller's axes) and of lse."""
        with self.session.guarded():
            return self._backward(result, dout, dlse, wrt)

    def _forward(self, keep_wide: bool) -> Result:
        session, dtype = self.session, self.arguments.q.dtype
        session.run(self._works)
        kept = accumulation_dtype(self.arguments.q) if keep_wide else dtype
        wide, maximum, total = session.join("q", [work.finish(kept) for work in self._works])
        return Result(self._xp.astype(wide, dtype, copy=False), wide, maximum, total)

    def _backward(self, result: Result, dout: Array, dlse: Array | None, wrt: Sequence[str]) -> tuple[Array, ...]:
        arguments, session = self.arguments, self.session
        if session.anywhere(dlse is not None) and dlse is None:
            dlse = self._xp.zeros_like(result.maximum)  # others have one, and what is traded must be alike
        rows = (swap_axes(dout, arguments.axes), dlse, result.out, result.wide, result.maximum, result.total)
        backward: list[Any] = [
            BackwardWork(work, *cast(Any, parts), wanted=frozenset(wrt))
            for work, parts in zip(self._works, session.split("q", rows), strict=True)
        ]
        carried = session.run(backward)
        shares = {name: [work.replicated[name] for work in backward] for name in wrt if name in backward[0].replicated}
        of_rows = {"q": [work.dq for work in backward]} if "q" in wrt else {}
        if "bias" in wrt and arguments.bias is not None:
            of_bias = shares if arguments.bias.shape[2] == 1 else of_rows
            of_bias["bias"] = [work.dbias for work in backward]
        of_keys = [name for name in ("k", "v") if name in wrt]
        gradients = self._of_replicated(shares)
        gradients |= self._joined("q", list(of_rows), zip(*of_rows.values(), strict=True))
        gradients |= self._joined("k", of_keys, (blocks for blocks in carried if blocks is not None))
        return tuple(self._as_it_came(name, gradients[name]) for name in wrt)

    def _joined(self, side: Side, names: Sequence[str], parts: Iterable[Blocks]) -> dict[str, Array]:
        """The gradients of these names, from what each shard that ran here has of their rows."""
        if not names:
            return {}
        typed = [tuple(map(self._in_dtype, names, blocks)) for blocks in parts]
        return dict(zip(names, self.session.join(side, typed), strict=True))

    def _of_replicated(self, shares: dict[str, list[Array]]) -> dict[str, Array]:
        """The gradients of what every rank has whole: of this process's ranks, or of all if that is asked for."""
        sums = {name: add_all(shares[name]) for name in sorted(shares)}
        sums = {name: x if name == "bias" else self._of_all_heads(name, x) for name, x in sums.items()}
        if sums and self.arguments.reduce_replicated:
            sums = dict(zip(sums, self.session.sum_over_ranks(tuple(sums.values())), strict=True))
        return {name: self._in_dtype(name, total) for name, total in sums.items()}

    def _of_all_heads(self, name: str, share: Array) -> Array:
        """This rank's share of the gradient of ``name``, with 0 for heads that others compute."""
        like, axis = getattr(self.arguments, name), 0 if name == "sinks" else 1
        if share.shape == like.shape:
            return share
        whole = self._xp.zeros(like.shape, dtype=share.dtype, device=array_api_compat.device(share))
        return put(whole, (slice(None),) * axis + (self.session.heads(like.shape[axis]), ...), share)

    def _in_dtype(self, name: str, gradient: Array) -> Array:
        """The gradient in the dtype of its input."""
        like = getattr(self.arguments, name)
        return self._xp.astype(gradient, like.dtype, copy=False)

    def _as_it_came(self, name: str, gradient: Array) -> Array:
        """The gradient in the shape and axes in which its input was given."""
        if name == "bias":
            return self._xp.reshape(gradient, self.arguments.bias_shape)
        return gradient if name == "sinks" else swap_axes(gradient, self.arguments.axes)
