"""What every rank of a ring has of something, given to all: gradients of replicated inputs, partials of one query."""

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
def gather_plans(size: int) -> tuple[Plan, ...]:
    """Every rank's plan where each one's block visits all others, and nothing is carried home."""
    return rotation(size, lambda resident, visitor: (_ALL,))


class GatherWork:
    """Takes the arrays of all ranks.

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

    def by_rank(self) -> list[Blocks]:
        """Every rank's arrays, in the order of ranks: what is made of them by turns is the same on all, bit for bit."""
        # Visitors come from the rank itself, the one before it, and so on.
        came = [self._came[(self._rank - rank) % self._size] for rank in range(self._size)]
        return [
            tuple(namespace(x).reshape(x, shape) for x, shape in zip(block, self._shapes, strict=True))
            for block in came
        ]


def add_all(parts: Sequence[Array]) -> Array:
    """The sum of arrays of one shape, from the first on."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
