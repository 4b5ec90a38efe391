"""Layouts: which rank holds which positions of the sequence, as plain ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ringcore.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """A sequence dealt to the ranks of a ring.

    shards: for each rank the global positions that it holds, as ranges in the order of its local rows.
        Every position from 0 up to the length occurs exactly once. Shards may be uneven or empty.
    name: for messages; "custom" for a layout of your own.

    Raises LayoutError if the ranges are not a partition of the positions.
    """

    shards: tuple[tuple[range, ...], ...]
    name: str = "custom"

    def __post_init__(self) -> None:
        for rank, shard in enumerate(self.shards):
            for piece in shard:
                if not isinstance(piece, range) or piece.step < 1:
                    raise LayoutError(f"rank {rank} holds {piece!r}: a shard is made of ranges with a positive step.")
        shards = tuple(tuple(piece for piece in shard if len(piece)) for shard in self.shards)
        object.__setattr__(self, "shards", shards)
        if not shards:
            raise LayoutError("a layout needs at least one rank; it came with no shards.")
        owned = bytearray(self.length)
        for rank, shard in enumerate(shards):
            for piece in shard:
                if piece[0] < 0 or piece[-1] >= self.length:
                    raise LayoutError(
                        f"rank {rank} holds {piece!r}, but the {self.length} positions of this layout "
                        f"are 0 to {self.length - 1}: each of them must occur exactly once."
                    )
                if 1 in owned[piece.start : piece.stop : piece.step]:
                    raise LayoutError(f"rank {rank} holds {piece!r}, a part of which another range holds already.")
                owned[piece.start : piece.stop : piece.step] = b"\x01" * len(piece)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.shards)

    @property
    def length(self) -> int:
        """The number of positions over all ranks."""
        return sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many rows each rank holds."""
        return tuple(sum(map(len, shard)) for shard in self.shards)

    @property
    def whole(self) -> bool:
        """Whether one rank holds all positions, in order: its shard is the array itself."""
        if self.size != 1:
            return False
        starts = [0, *(piece.stop for piece in self.shards[0])]
        return all(
            piece.start == start and piece.step == 1 for start, piece in zip(starts, self.shards[0], strict=False)
        )

    def positions(self, rank: int) -> list[int]:
        """The global positions of ``rank``'s rows, in order: the position ids for rotary embeddings."""
        return [position for piece in self.shards[rank] for position in piece]


def contiguous(length: int, size: int) -> Layout:
    """Consecutive pieces, one for each rank; the first ``length % size`` are one longer."""
    _check_counts(length, size)
    return Layout(tuple((piece,) for piece in _pieces(length, size)), "contiguous")


def striped(length: int, size: int) -> Layout:
    """Rank r holds positions r, r + size, r + 2 size, and so on (Brandon et al. 2023, arXiv:2311.09431)."""
    _check_counts(length, size)
    return Layout(tuple((range(rank, length, size),) for rank in range(size)), "striped")


def zigzag(length: int, size: int) -> Layout:
    """Rank r holds pieces r and 2 size - 1 - r out of 2 size, so that causal work is even."""
    _check_counts(length, size)
    pieces = _pieces(length, 2 * size)
    return Layout(tuple((pieces[rank], pieces[2 * size - 1 - rank]) for rank in range(size)), "zigzag")


def from_lengths(lengths: Iterable[int]) -> Layout:
    """Consecutive pieces of the given lengths, one for each rank."""
    lengths = list(lengths)
    if min(lengths, default=0) < 0:
        raise LayoutError(f"the lengths are {lengths}; a rank holds 0 rows or more.")
    ends = [0, *accumulate(lengths)]
    return Layout(tuple((range(start, end),) for start, end in pairwise(ends)), "contiguous")


def of_groups(layout: Layout, size: int) -> Layout:
    """The layout of groups of so many ranks, each of which has the rows of its ranks, one after the other."""
    groups = (layout.shards[first : first + size] for first in range(0, layout.size, size))
    return Layout(tuple(_joined(piece for shard in group for piece in shard) for group in groups), layout.name)


def _joined(pieces: Iterable[range]) -> tuple[range, ...]:
    found: list[range] = []
    for piece in pieces:
        if found and piece.step == found[-1].step == 1 and piece.start == found[-1].stop:
            found[-1] = range(found[-1].start, piece.stop)
        else:
            found.append(piece)
    return tuple(found)


NAMED: dict[str, Callable[[int, int], Layout]] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


AUTO = "auto"
"""The name of whichever layout suits a call that has whole arrays."""


def resolve_layout(layout: str | Layout, length: int, size: int, what: str = "the sequence") -> Layout:
    """The layout of ``length`` positions over ``size`` ranks: by name, or checked if it is a Layout.

    Raises LayoutError for an unknown name, and for a Layout of another length or ring size.
    """
    if isinstance(layout, Layout):
        if (layout.length, layout.size) != (length, size):
            raise LayoutError(
                f"the {layout.name} layout deals {layout.length} positions to {layout.size} ranks, but {what} has "
                f"{length} positions and the ring {size} ranks. Build the layout for these numbers."
            )
        return layout
    check_layout_name(layout)
    return NAMED[layout](length, size)


def layout_of_lengths(layout: str | Layout, lengths: Sequence[int], what: str) -> Layout:
    """The layout of shards whose lengths are known, checked against them.

    "contiguous" takes any lengths; the other names and a Layout fix them.
    Raises LayoutError if a rank's length is not the layout's.
    """
    if layout == "contiguous":
        return from_lengths(lengths)
    resolved = resolve_layout(layout, sum(lengths), len(lengths), what)
    for rank, (came, due) in enumerate(zip(lengths, resolved.lengths, strict=True)):
        if came != due:
            raise LayoutError(
                f"{what} has {came} rows on rank {rank}, but {resolved.name} over {resolved.size} ranks gives that "
                f"rank {due} of {resolved.length}. Split it with ringcore.shard(x, {resolved.name!r}, rank, size)."
            )
    return resolved


def check_layout_name(layout: object, keyword: str = "layout") -> None:
    """Raise LayoutError unless ``layout``, given as ``keyword``, is a Layout or the name of one."""
    if not isinstance(layout, Layout) and (not isinstance(layout, str) or layout not in NAMED):
        raise LayoutError(f"{keyword} is {layout!r}; it must be a ringcore.Layout or one of {', '.join(NAMED)}.")


def _check_counts(length: int, size: int) -> None:
    if length < 0 or size < 1:
        raise LayoutError(
            f"{length} positions over {size} ranks: there must be 0 positions or more, and 1 rank or more."
        )


def _pieces(length: int, count: int) -> list[range]:
    short, longer = divmod(length, count)
    ends = list(accumulate(short + (index < longer) for index in range(count)))
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
