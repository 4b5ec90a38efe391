"""Ranks in a grid: heads are dealt inside each group, and keys travel around rings between the groups.

Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv:2309.14509) inside a group, ring attention between groups, together as in
Fang and Zhao 2024 (arXiv:2405.07719).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ringcore.arguments import Arguments
from ringcore.errors import KeywordError, RingcoreError, ShapeError, UnsupportedError
from ringcore.protocols import Transport
from ringcore.routes import RING
from ringcore.values import Array


class Grid:
    """Two transports of one rank: ``ring`` to the ranks of its place in other groups, ``heads`` inside its group.

    Rank ``ring.rank * heads.size + heads.rank`` of the grid holds that shard of a layout over all ranks. Making one is
    collective. Give it, or the two as a tuple ``(ring, heads)``, as ``ring=`` of attention.

    Raises KeywordError, on every rank, if the two are not the row and the column of one grid.
    """

    def __init__(self, ring: Transport, heads: Transport) -> None:
        self._put(ring, heads)
        self._check_shape()

    def _put(self, ring: Transport, heads: Transport) -> None:
        self.ring, self.heads = ring, heads
        self.rank, self.size = ring.rank * heads.size + heads.rank, ring.size * heads.size
        self.node, self.sharers = ring.node, max(ring.sharers, heads.sharers)

    def carried(self, carry: Callable[[Transport], Transport]) -> Grid:
        """The same grid, with its transports under what ``carry`` makes of them."""
        grid = object.__new__(Grid)
        grid._put(carry(self.ring), carry(self.heads))
        return grid

    @property
    def explain(self) -> str:
        """How blocks travel."""
        inside, between = (getattr(each, "explain", type(each).__name__) for each in (self.heads, self.ring))
        sizes = f"{self.ring.size} groups of {self.heads.size}"
        return f"grid, rank {self.rank} of {sizes}; heads inside a group: {inside}; keys between groups: {between}"

    def check(self, *arrays: Array) -> None:
        """Raise UnsupportedError, by name, for arrays that cannot be carried."""
        self.ring.check(*arrays)
        self.heads.check(*arrays)

    def capturing(self) -> bool:
        """Whether the caller's work is recorded for a graph, not run."""
        return bool(getattr(self.ring, "capturing", bool)())

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note, in the order of ranks."""
        try:
            inside = [part.hex() for part in self._gathered(b"heads ", self.heads, note)]
            groups = self._gathered(b"ring ", self.ring, json.dumps(inside).encode())
        except RingcoreError as error:  # which the other of the two has not heard of
            self.abort(error)
            raise
        return tuple(bytes.fromhex(part) for group in groups for part in json.loads(group))

    def _gathered(self, name: bytes, of: Transport, note: bytes) -> list[bytes]:
        """Every rank's note to those of one of the two, which they must all have in the same place."""
        notes = of.gather(name + note)
        if not all(each.startswith(name) for each in notes):
            raise KeywordError(
                f"ring is two groups here, the {name.decode()}one of {of.size} ranks, which is something else on "
                "another rank. Every rank must give the two in the same order: (between groups, inside one)."
            )
        return [each.removeprefix(name) for each in notes]

    def abort(self, error: BaseException) -> None:
        """Tell every peer, and by them all ranks."""
        self.heads.abort(error)
        self.ring.abort(error)

    def part(self, heads: int) -> slice:
        """Which of so many heads this rank computes."""
        count = heads // self.heads.size
        return slice(self.heads.rank * count, (self.heads.rank + 1) * count, 1)

    def _check_shape(self) -> None:
        mine = self.ring.rank, self.heads.rank, self.ring.size, self.heads.size

        def places(of: Transport, note: Any) -> list[Any]:
            return [json.loads(part) for part in of.gather(json.dumps(note).encode())]

        row = places(self.heads, mine)
        due = [[self.ring.rank, n, self.ring.size, self.heads.size] for n in range(self.heads.size)]
        columns = places(self.ring, [mine, row == due])
        fits = [[[n, self.heads.rank, self.ring.size, self.heads.size], True] for n in range(self.ring.size)]
        if not all(places(self.heads, columns == fits)):
            raise KeywordError(
                f"ring holds two groups, of {self.ring.size} and {self.heads.size} ranks with this one as rank "
                f"{self.ring.rank} and {self.heads.rank} of them, that are not the row and the column of one grid. Of "
                "ranks r = g * U + u, the first joins those of equal u in the order of g, the second the U ranks of "
                "equal g in the order of u."
            )


def grid_of(ring: Transport, heads: Transport) -> Grid:
    """The grid of these two, kept as long as the first. The first call is collective."""
    made: dict[int, Grid] = getattr(ring, "__dict__", {}).setdefault("_grids", {})
    if id(heads) not in made:
        made[id(heads)] = Grid(ring, heads)  # which keeps the second, so that no other gets its id
    return made[id(heads)]


def check_for_grid(arguments: Arguments, grid: Grid) -> None:
    """Raise for what cannot be dealt by heads: UnsupportedError by name, ShapeError for heads that do not divide."""
    if arguments.dilation is not None:
        raise UnsupportedError(
            "dilated_attention deals its heads to offsets, not to the ranks of a grid. Give one ring of all ranks."
        )
    key_heads, size = arguments.k.shape[1], grid.heads.size
    if key_heads % size:
        raise ShapeError(
            f"k and v have {key_heads} heads, which the {size} ranks of a head-parallel group do not divide. Make "
            f"groups of a divisor of {key_heads}, and the ring between them longer."
        )
    for name, given in (("bias", arguments.bias), ("mask", arguments.mask)):
        if given is not None:
            raise UnsupportedError(
                f"{name} is an array of this rank's rows, which a grid of heads and ring does not deal by heads. Say "
                "it with causal, window, documents, alibi or a mask that is a function, or use a ring alone."
            )
    if arguments.schedule != RING:
        raise UnsupportedError(
            f"schedule is {arguments.schedule!r}, but in a grid keys go around one ring. Leave it out."
        )
