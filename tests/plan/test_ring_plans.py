"""The plans of the ring: what they compute against dense masks, and what they exchange in a simulation and in the loop."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
from counting import CountingWork, Rows, check_loops
from deals import DEALS, SIGHTS, calls, deals, problem, visibility
from hypothesis import given, settings
from lockstep import check_exchanges
from pairs import computed, shown

import ringcore
from ringcore.exchange import InPlace
from ringcore.ring import ring
from ringcore.schedule import ring_plans
from ringcore.values import Begin, Move

SIZES = range(1, 9)


def planned(sight, name, size):
    """Layouts, visibility and plans of one row of the table."""
    row = {"queries": 13, "keys": 13, **SIGHTS[sight]}
    q_layout, k_layout = deals(name, row.pop("queries"), row["keys"], size)
    seen = visibility(**row)
    return problem(q_layout, k_layout, seen), ring_plans(q_layout, k_layout, seen)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("name", DEALS)
def test_plans_compute_every_visible_pair_once(name, sight, size):
    case, plans = planned(sight, name, size)
    assert computed(case, plans) == case.defined()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DEALS)
def test_plans_exchange_what_is_needed_and_no_more(name, size):
    for sight in SIGHTS:
        _, plans = planned(sight, name, size)
        # The block that is read and the one that comes meanwhile; a rank's own, where parts of it leave later.
        straight = any(move.rows for plan in plans for step in plan.steps for move in step.sends)
        assert check_exchanges(plans).most_held <= 2 + straight


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sight", SIGHTS)
def test_a_rank_reads_no_rows_but_those_it_is_said_to_see(sight, size):
    for name in DEALS:
        _, plans = planned(sight, name, size)
        for plan in plans:
            for step in plan.steps:
                rows = [row for tile in step.tiles for row in range(tile.columns.start, tile.columns.stop)]
                if step.block is not None:
                    seen = plan.seen(step.block, step.rows)
                    assert (seen.start, seen.stop) == (min(rows, default=0), max(rows, default=-1) + 1)
            absent = set(range(size)) - {step.block for step in plan.steps}
            assert all(plan.seen(block) == slice(0, 0) for block in absent)


def test_half_of_a_zigzag_block_is_seen_by_the_rank_after():
    layout = ringcore.zigzag(16, 2)
    first, second = ring_plans(layout, layout, visibility(keys=16, causal=True))
    assert (first.seen(1), second.seen(0)) == (slice(0, 8), slice(0, 4))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sight", SIGHTS)
def test_the_loop_counts_every_visible_pair_once(sight, size):
    check_loops(*planned(sight, DEALS[size % len(DEALS)], size))


def test_the_loop_lets_go_of_blocks_that_it_needs_no_more():
    layout = ringcore.contiguous(12, 6)
    case, plans = problem(layout, layout, visibility(keys=12)), ring_plans(layout, layout, visibility(keys=12))
    loop = ring(plans[2], CountingWork(case, plans[2], carries=False))
    came, most, request = [], 0, next(loop)
    # One rank alone, whose neighbours are always ready.
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(request, Begin):
                reply = [move for move, _ in request.receives]
            else:
                reply = {move: (Rows([0, 1]),) for move in request.token}
                came += [weakref.ref(blocks[0]) for blocks in reply.values()]
            request = loop.send(reply)
            most = max(most, sum(block() is not None for block in came))
    assert len(came) == 5
    assert most <= 2


@given(calls())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_plans_of_any_layouts_are_exact(call):
    case, plans = problem(*call), ring_plans(*call)
    assert computed(case, plans) == case.defined()
    check_exchanges(plans)


@given(calls())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_loop_is_exact_for_any_layouts(call):
    check_loops(problem(*call), ring_plans(*call))


def one_head(length, **sight):
    return visibility(keys=length, heads=1, key_heads=1, **{"offsets": (0,), **sight})


def hops(layout, seen):
    """How often each rank's block is sent."""
    sent = check_exchanges(ring_plans(layout, layout, seen)).sent
    return [sent[rank] for rank in range(layout.size)]


@pytest.mark.parametrize("size", SIZES)
def test_causal_blocks_travel_to_later_ranks_alone(size):
    layout = ringcore.contiguous(24, size)
    assert hops(layout, one_head(24, causal=True)) == [size - 1 - rank for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_blocks_in_a_window_travel_as_far_as_it_reaches(size):
    layout = ringcore.contiguous(4 * size, size)
    for left in range(4 * size):
        # The last key of a block is seen up to ``left`` positions further on.
        reached = [min(size - 1, (4 * rank + 3 + left) // 4) - rank for rank in range(size)]
        assert hops(layout, one_head(4 * size, causal=True, window=(left, None))) == reached


@pytest.mark.parametrize("size", SIZES)
def test_blocks_that_all_ranks_see_travel_around(size):
    for layout in (ringcore.zigzag(32, size), ringcore.striped(32, size)):
        assert hops(layout, one_head(32, causal=True)) == [size - 1] * size


@pytest.mark.parametrize("size", SIZES)
def test_blocks_that_nobody_sees_stay(size):
    layout = ringcore.striped(20, size)
    plans = ring_plans(layout, layout, one_head(20, key_limits=(0,)))
    assert check_exchanges(plans).sent.total() == 0
    assert not any(plan.tiles for plan in plans)


@pytest.mark.parametrize("size", SIZES)
def test_causal_work_is_even_in_zigzag_at_every_hop(size):
    layout = ringcore.zigzag(6 * size, size)
    seen = one_head(6 * size, causal=True)
    plans = ring_plans(layout, layout, seen)
    work = [[sum(1 for tile in step.tiles for _ in shown(tile)) for step in plan.steps] for plan in plans]
    assert all(line == work[0] for line in work)


def test_plans_of_equal_batch_entries_share_their_tiles():
    layout = ringcore.contiguous(12, 3)
    seen = visibility(keys=12, causal=True, offsets=(0, 0, 5, 0))
    for plan in ring_plans(layout, layout, seen):
        assert {(tile.batch.start, tile.batch.stop) for tile in plan.tiles} <= {(0, 2), (2, 3), (3, 4)}


def test_no_rows_are_fetched_but_those_that_are_read():
    layout = ringcore.zigzag(16, 2)
    _, plan = ring_plans(layout, layout, visibility(keys=16, causal=True))

    class Recording:
        rank, size, node, sharers = 1, 2, 0, 1

        def reaches(self, reader, owner):
            return True

        def fetch(self, owner, rows, seen):
            return owner, rows, seen

        def exchange(self, kind, sends, receives):
            assert not sends
            assert not receives
            return SimpleNamespace(wait=dict)

    move = Move(0, 0)
    fetched = InPlace(Recording(), plan).exchange("visiting", [(Move(0, 1), ())], [(move, ())]).wait()
    assert fetched == {move: (0, None, slice(0, 4))}
