"""How the ranks of a group deal heads: each gives every other one its part, in the one loop.

What is rows of the loop's blocks here is heads, or a peer's rows: blocks visit straight from their owner, in part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import array_api_compat

from ringcore.arrays import put, slice_of
from ringcore.schedule import Visit, journeys
from ringcore.values import Array, Blocks, Move, Plan, Spec, Tile, namespace

Indexes = Callable[[int], tuple[Any, ...]]

_ONE = slice(0, 1, 1)


@lru_cache(maxsize=256)
def trade_plans(parts: tuple[range, ...], gives: tuple[bool, ...]) -> tuple[Plan, ...]:
    """Every rank's plan where all give each other their part at once: rank r gets ``parts[r]`` of each one's rows.

    gives: which ranks have anything.
    """
    size = len(parts)

    def tiles(resident: int, visitor: int) -> tuple[Tile, ...]:
        if not gives[visitor] or not parts[resident]:
            return ()
        columns = slice(0, len(parts[resident]), 1)
        return (Tile(_ONE, _ONE, _ONE, _ONE, columns, (range(1),), (range(len(parts[resident])),)),)

    def visits(owner: int) -> list[Visit]:
        guests = ((hop, (owner + hop) % size) for hop in range(1, size))
        return [Visit(hop, guest, owner, 0, parts[guest]) for hop, guest in guests if tiles(guest, owner)]

    return journeys([visits(owner) for owner in range(size)], tiles)


class TradeWork:
    """Puts what every rank gives into arrays of this rank.

    arrays [.., .., rows, ..]: what this rank gives. into: where parts belong, ``places(owner)`` says at which index.
    shapes: for each owner, of its arrays.
    """

    def __init__(
        self, arrays: Blocks, into: Sequence[Array], places: Sequence[Indexes], plan: Plan, part: range,
        shapes: Callable[[int], Sequence[tuple[int, ...]]],
    ) -> None:  # fmt: skip
        self._arrays, self.into, self._places, self._part, self._shapes = arrays, list(into), places, part, shapes
        self._rank = plan.rank
        self._owners = [step.block for step in plan.steps if step.block is not None]

    def visiting(self) -> Blocks:
        """All that this rank gives."""
        return self._arrays

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        """What its owner gives, or a part of its rows."""
        shapes = self._shapes(move.block)
        rows = {} if move.rows is None else {2: len(move.rows)}
        return tuple(
            Spec(tuple(rows.get(axis, length) for axis, length in enumerate(shape)), x, x.dtype)
            for shape, x in zip(shapes, self._arrays, strict=True)
        )

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        """Nothing."""
        return ()

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        """Put the block where it belongs."""
        owner = self._owners.pop(0)
        if owner == self._rank:
            block = tuple(x[:, :, slice_of(self._part), :] for x in block)
        if tiles:
            self.into = [
                put(into, place(owner), x) for into, place, x in zip(self.into, self._places, block, strict=True)
            ]
        return ()

    def complete(self) -> None:
        """Nothing."""

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        """Never called: nothing is carried."""
        raise NotImplementedError


def heads_as_rows(x: Array, groups: int) -> Array:
    """[B, H, S, D] as [B, S, groups, H / groups * D]: what belongs to one group of heads is one row."""
    xp, (batch, heads, rows, width) = namespace(x), x.shape
    cut = xp.reshape(x, (batch, groups, heads // groups, rows, width))
    return xp.reshape(xp.permute_dims(cut, (0, 3, 1, 2, 4)), (batch, rows, groups, heads // groups * width))


def rows_as_heads(x: Array, width: int) -> Array:
    """[B, S, groups, h * D] as [B, groups * h, S, D], with D = ``width``."""
    xp, (batch, rows, groups, numbers) = namespace(x), x.shape
    cut = xp.permute_dims(xp.reshape(x, (batch, rows, groups, numbers // width, width)), (0, 2, 3, 1, 4))
    return xp.reshape(cut, (batch, groups * (numbers // width), rows, width))


def empty(shape: tuple[int, ...], like: Array) -> Array:
    """Memory for an array of the library, dtype and device of ``like``."""
    return namespace(like).empty(shape, dtype=like.dtype, device=array_api_compat.device(like))
