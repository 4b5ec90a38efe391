"""Sums over all ranks of what each one has of the gradient of a replicated input."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

from ringcore.schedule import rotation
from ringcore.values import Array, Blocks, Move, Plan, Spec, Tile, namespace

_ONE = slice(0, 1, 1)
# The one row that the arrays travel as is read: what no tile reads is not fetched.
_ALL = Tile(_ONE, _ONE, _ONE, _ONE, _ONE, (range(1),), (range(1),))


@cache
def sum_plans(size: int) -> tuple[Plan, ...]:
    """Every rank's plan where each one's block visits all others, and nothing is carried home."""
    return rotation(size, lambda resident, visitor: (_ALL,))


class SumWork:
    """Adds the arrays of all ranks in the order of ranks, so that every rank gets the same sums, bit for bit.

    arrays: of equal shapes and dtypes on every rank. They travel as [1, 1, 1, n].
    """

    def __init__(self, arrays: Sequence[Array], rank: int, size: int) -> None:
        self._shapes = [x.shape for x in arrays]
        self._own = tuple(namespace(x).reshape(x, (1, 1, 1, prod(x.shape))) for x in arrays)
        self._rank, self._size = rank, size
        self._came: list[Blocks] = []

    def visiting(self) -> Blocks:
        """This rank's arrays."""
        return self._own

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        """Arrays like this rank's."""
        return tuple(Spec(x.shape, x, x.dtype) for x in self._own)

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        """Nothing."""
        return ()

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        """Keep the arrays, whose memory is given to later visitors."""
        self._came.append(tuple(namespace(x).asarray(x, copy=True) for x in block))
        return ()

    def complete(self) -> None:
        """Nothing."""

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        """Never called: nothing is carried."""
        raise NotImplementedError

    def sums(self) -> Blocks:
        """One sum for each array, in its shape."""
        # Visitors come from the rank itself, the one before it, and so on.
        in_order = sorted(range(self._size), key=lambda hop: (self._rank - hop) % self._size)
        columns = zip(*(self._came[hop] for hop in in_order), strict=True)
        return tuple(
            namespace(parts[0]).reshape(add_all(parts), shape)
            for parts, shape in zip(columns, self._shapes, strict=True)
        )


def add_all(parts: Sequence[Array]) -> Array:
    """The sum of arrays of one shape, from the first on."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
