"""Dilated attention: branches of segments, of which each head keeps every so many positions.

Ding et al. 2023 (LongNet), arXiv:2307.02486, equations 3 to 15. Their mixture of branches is one softmax over all keys
that a query sees in any of them, each counted as often as branches show it; so a branch is nothing but more tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import gcd, lcm
from typing import Any

from ringcore.arrays import slice_of
from ringcore.errors import KeywordError
from ringcore.integers import integers

HEAD_OFFSETS = ("modulo", "block")
NAMES = "segment_lengths", "dilation_rates"


@dataclass(frozen=True)
class Dilation:
    """Which pairs see each other, and how often.

    branches: pairs (w, r). In segments of w positions, i // w, head h keeps those with (i % w) % r equal to its offset;
    what it keeps of one segment sees itself. head_offset: that offset is h % r ("modulo"), or h // ceil(H / r), so
    that neighbouring heads share it ("block").
    """

    branches: tuple[tuple[int, int], ...]
    head_offset: str = "modulo"

    def heads(self, rate: int, count: int) -> list[range]:
        """For each offset, from 0 on, the heads that have it, of ``count``."""
        if self.head_offset == "modulo":
            return [range(offset, count, rate) for offset in range(min(rate, count))]
        side = -(-count // rate)
        return [range(first, min(count, first + side)) for first in range(0, count, side)]


def check_dilation(segment_lengths: Any, dilation_rates: Any, head_offset: Any) -> Dilation:
    """What `ringcore.dilated_attention` was told, as a value; raises KeywordError."""
    due = "it must hold a whole number for each branch, each 1 or more"
    given = zip(NAMES, (segment_lengths, dilation_rates), strict=True)
    lengths, rates = (integers(name, x, due) for name, x in given)
    for name, numbers in zip(NAMES, (lengths, rates), strict=True):
        if min(numbers, default=0) < 1:
            raise KeywordError(f"{name} is {numbers}; it must hold a number for each branch, each 1 or more.")
    if len(lengths) != len(rates):
        raise KeywordError(
            f"there are {len(lengths)} segment_lengths and {len(rates)} dilation_rates; each branch has one of both."
        )
    if head_offset not in HEAD_OFFSETS:
        raise KeywordError(f'head_offset is {head_offset!r}; it must be "modulo" or "block".')
    return Dilation(tuple(zip(lengths, rates, strict=True)), head_offset)


def common(one: range, other: range) -> range:
    """The numbers that are in both ranges, which rise."""
    if not one or not other:
        return range(0)
    shared = gcd(one.step, other.step)
    gap = other.start - one.start
    if gap % shared:
        return range(0)
    step = lcm(one.step, other.step)
    turns = gap // shared * pow(one.step // shared, -1, other.step // shared) % (other.step // shared)
    first = one.start + one.step * turns
    first += max(0, -(-(max(one.start, other.start) - first) // step)) * step
    return range(first, min(one[-1], other[-1]) + 1, step)


def segments_of(shards: Sequence[range], length: int) -> set[int]:
    """Which segments of so many positions some of the ranges reach."""
    return {
        segment
        for shard in shards
        if shard
        for segment in (
            range(shard[0] // length, shard[-1] // length + 1)
            if shard.step <= length
            else {position // length for position in shard}
        )
    }


def head_slices(heads: range, group: int) -> Iterator[tuple[slice, slice]]:
    """(query heads, key heads) of as few tiles as can say which key head, h // group, each of these heads reads."""
    read: dict[int, list[int]] = {}
    for head in heads:
        read.setdefault(head // group, []).append(head)
    keys = range(min(read), max(read) + 1, next((b - a for a, b in pairwise(read)), 1))
    if len({len(members) for members in read.values()}) == 1 and list(keys) == list(read):
        yield slice_of(heads), slice_of(keys)
        return
    for key, members in read.items():
        yield slice(members[0], members[-1] + 1, heads.step), slice(key, key + 1)


def kept(
    dilation: Dilation, rows: Sequence[range], columns: Sequence[range], heads: int
) -> Iterator[tuple[range, range]]:
    """(positions, heads): what these heads keep of a segment that has rows and columns, branch by branch."""
    for length, rate in dilation.branches:
        both = segments_of(rows, length) & segments_of(columns, length)
        for segment, (offset, some) in product(sorted(both), enumerate(dilation.heads(rate, heads))):
            yield range(segment * length + offset, (segment + 1) * length, rate), some
