"""The work of a ring in which k and v stay and queries visit: for few queries over many keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringcore.forward_work import ForwardWork, block_spec
from ringcore.merge import fields, merge
from ringcore.partial import Partial, accumulation_dtype
from ringcore.protocols import Arithmetic, Kernels
from ringcore.values import Array, Blocks, Move, Score, Spec, Tile


class QueryWork:
    """k and v stay, q visits, and the partial of its rows is carried home.

    lengths: how many rows of q each rank has. sinks: each row sees its head's once, on the rank that has the row.
    """

    def __init__(
        self, q: Array, k: Array, v: Array, sinks: Array | None, *, score: Score, kernels: Kernels,
        lengths: Sequence[int], arithmetic: Arithmetic,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.sinks, self.lengths = q, k, v, sinks, lengths
        self._shared: dict[str, Any] = {
            "score": score, "kernels": kernels, "lengths": (), "arithmetic": arithmetic,
        }  # fmt: skip

    def visiting(self) -> Blocks:
        """q [B, H, S, D]."""
        return (self.q,)

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        """q of the block's owner."""
        return (block_spec(self.q, self.q.dtype, self.lengths, move),)

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        """weighted [B, H, S, E], maximum and total [B, H, S, 1] of the owner's rows."""
        batch, heads, rows, _ = block_spec(self.q, self.q.dtype, self.lengths, move).shape
        dtype = accumulation_dtype(self.q)
        return tuple(Spec((batch, heads, rows, width), self.q, dtype) for width in (self.v.shape[3], 1, 1))

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        """What the visiting queries see of this rank's keys."""
        (q,) = block
        sinks = self.sinks if q is self.q else None
        work = ForwardWork(q, self.k, self.v, None, None, sinks=sinks, **self._shared)
        work.visit((self.k, self.v), tiles)
        return _carried(work.partial())

    def complete(self) -> None:
        """Nothing."""

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        """The partials, merged."""
        return _carried(merge(partial_of(arrived), partial_of(share)))


def partial_of(carried: Blocks) -> Partial:
    """What came home."""
    weighted, maximum, total = carried
    return Partial(weighted, maximum[..., 0], total[..., 0])


def _carried(partial: Partial) -> Blocks:
    weighted, maximum, total = fields(partial)
    return weighted, maximum[..., None], total[..., None]
