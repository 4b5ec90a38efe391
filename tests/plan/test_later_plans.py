"""Plans of later features, as they will be: exact, exchanged soundly, and run by the one loop as it is."""

from dataclasses import replace

import pytest
from checking import SIZES, check
from counting import at_home, loops_of
from deals import DEALS, deals, layouts, problem, visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from later import decode_plans
from lockstep import walk
from pairs import computed

import ringcore
from ringcore.routes import both_ways_plans, double_ring_plans
from ringcore.schedule import query_plans

# Visiting queries: k and v stay, and every partial of q goes home.


@pytest.mark.parametrize("sight", [{}, {"causal": True}, {"window": (3, 1)}, {"causal": True, "offsets": (8, 3)}])
@pytest.mark.parametrize("name", DEALS)
def test_visiting_queries(name, sight):
    for size in SIZES:
        dealt = deals(name, 5, 17, size)
        seen = visibility(keys=17, **sight)
        check(problem(*dealt, seen, visitor="q"), query_plans(*dealt, seen))


# Decoding: every rank has all queries and some keys; nothing visits, and every rank ends with everything.


@pytest.mark.parametrize(
    "sight", [{}, {"causal": True, "offsets": (9, 12)}, {"key_limits": (4, 0)}, {"window": (3, 3), "offsets": (9, 7)}]
)
@pytest.mark.parametrize("name", ["contiguous", "striped", "uneven", "mixed"])
def test_decoding(name, sight):
    for size in range(1, 9):
        _, k_layout = deals(name, 13, 13, size)
        seen = visibility(**sight)
        plans = decode_plans(2, k_layout, seen)
        case = problem(k_layout, k_layout, seen, visitor="q")
        case = replace(case, rows=(range(2),) * size)
        due = case.defined()
        assert computed(case, plans) == due
        trace = walk(plans)
        assert trace.sent.total() == 0
        assert list(trace.owned) == [{(rank, rank): 1 for rank in range(size)}] * size
        for results in loops_of(case, plans, carries=True, reuses=False):
            assert [at_home(*result) for result in results] == [due] * size


# Double rings: around the ranks of one host, then on to the next host.

HOSTS = ((1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (2, 4))


@pytest.mark.parametrize(
    "sight", [{}, {"causal": True}, {"causal": True, "window": (5, 0)}, {"window": (2, 2)}, {"key_limits": (3, 0)}]
)
@pytest.mark.parametrize("name", DEALS)
def test_double_rings(name, sight):
    for hosts, inside in HOSTS:
        dealt = deals(name, 17, 17, hosts * inside)
        seen = visibility(keys=17, **sight)
        trace = check(problem(*dealt, seen), double_ring_plans(*dealt, seen, inside))
        # The block that is read, the next one, and the next host's.
        assert trace.most_held <= 3


@pytest.mark.parametrize(("hosts", "inside"), HOSTS)
def test_double_rings_cross_between_hosts_as_little_as_can_be(hosts, inside):
    size = hosts * inside
    layout = ringcore.striped(2 * size, size)
    plans = double_ring_plans(layout, layout, visibility(keys=2 * size), inside)
    crossings = [
        move.block
        for plan in plans
        for step in plan.steps
        for move in step.sends
        if move.peer // inside != plan.rank // inside
    ]
    assert sorted(crossings) == sorted(list(range(size)) * (hosts - 1))
    assert len(plans[0].steps) == size


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_double_rings_of_any_layouts(data):
    hosts, inside = data.draw(st.sampled_from([(2, 2), (3, 1), (2, 3)]))
    length = data.draw(st.integers(0, 10))
    dealt = data.draw(layouts(length, hosts * inside)), data.draw(layouts(length, hosts * inside))
    side = st.none() | st.integers(0, 5)
    seen = visibility(keys=length, causal=data.draw(st.booleans()), window=(data.draw(side), data.draw(side)))
    check(problem(*dealt, seen), double_ring_plans(*dealt, seen, inside))


# Both ways: half of each block to the next ranks, the other half to those before.


@pytest.mark.parametrize(
    "sight", [{}, {"causal": True}, {"causal": True, "window": (5, 0)}, {"window": (2, 2)}, {"key_limits": (3, 0)}]
)
@pytest.mark.parametrize("name", DEALS)
def test_both_ways(name, sight):
    for size in SIZES:
        dealt = deals(name, 17, 17, size)
        seen = visibility(keys=17, **sight)
        trace = check(problem(*dealt, seen), both_ways_plans(*dealt, seen))
        # Two halves that are read, and the next two.
        assert trace.most_held <= 4


@pytest.mark.parametrize("size", range(2, 9))
def test_both_ways_share_the_links(size):
    """Every rank sends half a block to each side, in each of size - 1 hops: the least that links both ways allow."""
    layout = ringcore.striped(6 * size, size)
    for plan in both_ways_plans(layout, layout, visibility(keys=6 * size)):
        for sign in (1, -1) if size > 2 else (1,):
            to = [move for step in plan.steps for move in step.sends if move.peer == (plan.rank + sign) % size]
            assert sum(len(move.rows) for move in to) == 3 * (size - 1) * (1 if size > 2 else 2)
