"""Which pairs plans compute, counted in plain Python, and the definitions that they are held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

from ringcore.values import Plan, Step, Tile

Pair: TypeAlias = tuple[int, int, int, int]
"""Batch entry, query head, row of the whole q, key."""


@dataclass(frozen=True)
class Problem:
    """Who holds what, and by definition how often each pair counts.

    rows, keys: for each rank the rows of q and the keys that it holds, as numbers in the whole sequences.
    sees: how often (batch entry, query head, row, key) counts; True and False are once and never.
    visitor: which of "q" and "k" is read from the visiting block; the other stays.
    """

    rows: tuple[Sequence[int], ...]
    keys: tuple[Sequence[int], ...]
    sees: Callable[[int, int, int, int], int]
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    offsets: tuple[int, ...] = ()
    visitor: str = "k"

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.rows)

    def offset(self, entry: int) -> int:
        """The position of q's first row."""
        return self.offsets[entry] if self.offsets else 0

    def visiting(self, owner: int) -> Sequence[int]:
        """The visiting block of a rank, whole."""
        return (self.keys if self.visitor == "k" else self.rows)[owner]

    def resident(self, rank: int) -> Sequence[int]:
        """What stays at a rank."""
        return (self.rows if self.visitor == "k" else self.keys)[rank]

    def defined(self) -> Counter[Pair]:
        """Every pair as often as it counts, by asking for each."""
        rows, keys = (sorted({x for shard in shards for x in shard}) for shards in (self.rows, self.keys))
        every = product(range(self.batch), range(self.heads), rows, keys)
        return Counter({pair: times for pair in every if (times := int(self.sees(*pair)))})


def computed(problem: Problem, plans: Sequence[Plan]) -> Counter[Pair]:
    """Every pair as often as some tile of some rank computes it; each tile's own words are checked on the way."""
    found: Counter[Pair] = Counter()
    for plan in plans:
        for step in plan.steps:
            if step.block is None:
                assert not step.tiles
                continue
            block = came(step, problem.visiting(step.block))
            stays = problem.resident(plan.rank)
            rows, keys = (stays, block) if problem.visitor == "k" else (block, stays)
            for tile in step.tiles:
                check_tile(problem, tile, rows, keys)
                found.update(pairs(problem, tile, rows, keys))
    return found


def came(step: Step, block: Sequence[int]) -> Sequence[int]:
    """The part of a block that this step reads."""
    return block if step.rows is None else [block[row] for row in step.rows]


def check_tile(problem: Problem, tile: Tile, rows: Sequence[int], keys: Sequence[int]) -> None:
    """A tile's slices, positions and heads say the same, within the arrays that it cuts, and it is not empty."""
    for part, length in ((tile.rows, len(rows)), (tile.columns, len(keys))):
        # Array API slices must lie within the array.
        assert 0 <= part.start < part.stop <= length
    assert [j for r in tile.column_positions for j in r] == list(keys[tile.columns])
    for entry in range(problem.batch)[tile.batch]:
        due = [i + problem.offset(entry) for i in rows[tile.rows]]
        assert [i for r in tile.row_positions for i in r] == due
    assert (tile.height, tile.width) == (len(rows[tile.rows]), len(keys[tile.columns]))
    heads, key_heads = range(problem.heads)[tile.q_heads], range(problem.key_heads)[tile.k_heads]
    for place, head in enumerate(heads):
        read = key_heads[place // (len(heads) // len(key_heads))]
        assert read == head // (problem.heads // problem.key_heads)
    assert next(shown(tile), None) is not None, "a tile that shows nothing is in the plan"


def pairs(problem: Problem, tile: Tile, rows: Sequence[int], keys: Sequence[int]) -> Iterator[Pair]:
    """The tile's visible pairs."""
    rows, keys = rows[tile.rows], keys[tile.columns]
    seen = [(rows[i], keys[j]) for i, j in shown(tile)]
    for entry in range(problem.batch)[tile.batch]:
        for head in range(problem.heads)[tile.q_heads]:
            yield from ((entry, head, i, j) for i, j in seen)


def shown(tile: Tile) -> Iterator[tuple[int, int]]:
    """(row, column) of every pair that the tile's band shows, by asking for each."""
    lo, hi = tile.band.lo, tile.band.hi
    for i, j in product(range(tile.height), range(tile.width)):
        if (lo is None or lo <= j - i) and (hi is None or j - i <= hi):
            yield i, j
