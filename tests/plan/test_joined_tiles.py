"""Joining tiles: the same pairs in fewer tiles."""

from collections import Counter
from dataclasses import replace

import pytest
from deals import DEALS, SIGHTS, calls, deals, problem, visibility
from hypothesis import given, settings
from pairs import computed

import ringcore
from ringcore.schedule import ring_plans
from ringcore.values import Band

SIZES = range(1, 9)


def moves(step):
    """The step but for its tiles, and for which rows accumulators are carried."""
    carried = step.carry_out and tuple(replace(move, rows=None) for move in step.carry_out)
    return replace(step, tiles=(), carry_in=step.carry_in and replace(step.carry_in, rows=None), carry_out=carried)


def check_joining(q_layout, k_layout, seen):
    joined, single = (ring_plans(q_layout, k_layout, replace(seen, joined=joins)) for joins in (True, False))
    case = problem(q_layout, k_layout, seen)
    for ours, theirs in zip(joined, single, strict=True):
        assert computed(case, [ours]) == computed(case, [theirs])
        assert len(ours.tiles) <= len(theirs.tiles)
        # Joining changes tiles alone, and the rows that they reach: the same blocks are read and move at the same time.
        assert list(map(moves, ours.steps)) == list(map(moves, theirs.steps))
    for tile in (tile for plan in single for tile in plan.tiles):
        # One slice of a bias or mask names the keys of such a tile.
        assert len(tile.row_positions) == len(tile.column_positions) == 1


@pytest.mark.parametrize("name", DEALS)
@pytest.mark.parametrize("sight", SIGHTS)
def test_joined_tiles_show_the_same_pairs(sight, name):
    for size in (1, 2, 3, 5, 8):
        row = {"queries": 13, "keys": 13, **SIGHTS[sight]}
        q_layout, k_layout = deals(name, row.pop("queries"), row["keys"], size)
        check_joining(q_layout, k_layout, visibility(**row))


@given(calls())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_joined_tiles_of_any_layouts_show_the_same_pairs(call):
    check_joining(*call)


def causal_steps(layout, joined=True):
    seen = visibility(keys=layout.length, causal=True, joined=joined)
    for plan in ring_plans(layout, layout, seen):
        yield from ((plan.rank, step) for step in plan.steps if step.block is not None)


def extent(tile):
    return (tile.rows.start, tile.rows.stop), (tile.columns.start, tile.columns.stop)


@pytest.mark.parametrize("length", [32, 37, 64])
@pytest.mark.parametrize("size", SIZES)
def test_zigzag_needs_one_tile_for_each_visit(size, length):
    # Every piece has two rows or more: a single row shows no diagonal that a neighbour could join.
    layout = ringcore.zigzag(length, size)
    first = [len(shard[0]) for shard in layout.shards]
    for rank, step in causal_steps(layout):
        height, width = layout.lengths[rank], layout.lengths[step.block]
        due = {
            # Its own two pieces are one causal tile; of what was before, all rows see the first piece; of what comes
            # after, the second piece sees all.
            0: (((0, height), (0, width)), Band(None, 0)),
            1: (((0, height), (0, first[step.block])), Band()),
            -1: (((first[rank], height), (0, width)), Band()),
        }[(rank > step.block) - (rank < step.block)]
        (tile,) = step.tiles
        assert (extent(tile), tile.band) == due


def test_zigzag_without_joining_needs_more_tiles():
    joined, single = (
        Counter(rank for rank, step in causal_steps(ringcore.zigzag(32, 4), joined) for _ in step.tiles)
        for joined in (True, False)
    )
    assert joined == dict.fromkeys(range(4), 4)
    # Its own: two causal pieces and the later one on the earlier; each visitor: two.
    assert single == dict.fromkeys(range(4), 3 + 3 * 2)


@pytest.mark.parametrize("size", SIZES)
def test_contiguous_needs_one_tile_for_each_visit(size):
    for rank, step in causal_steps(ringcore.contiguous(32, size)):
        (tile,) = step.tiles
        assert tile.band == (Band(None, 0) if rank == step.block else Band())


@pytest.mark.parametrize("size", range(2, 9))
def test_striped_needs_one_tile_for_each_visit(size):
    for rank, step in causal_steps(ringcore.striped(4 * size, size)):
        (tile,) = step.tiles
        # A rank's row i sees its own column i, and that of the ranks before it in the stripe.
        assert tile.band == Band(None, 0 if step.block <= rank else -1)
