"""Plans of later features, as they will be: exact, exchanged soundly, and run by the one loop as it is."""

from dataclasses import replace

import pytest
from checking import SIZES, check
from counting import at_home, loops_of
from deals import DEALS, deals, layouts, problem, visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from later import decode_plans, dilated_plans, double_ring_plans, visiting_query_plans
from lockstep import check_exchanges, walk
from pairs import computed

import ringcore

# Dilated attention: one softmax over a multiset of keys, so pairs count as often as branches hold them.

BRANCHES = {
    "one dense": [(64, 1)],
    "nested": [(4, 1), (8, 2), (16, 4)],
    "segments that do not divide": [(5, 2), (7, 3)],
    "rate beyond its segment": [(3, 5), (16, 2)],
    "twice the same": [(6, 2), (6, 2)],
}


def times(branches):
    """m[h, i, j]: in how many branches head h pairs i and j."""

    def multiplicity(entry, head, i, j):
        return sum(i // w == j // w and (i % w) % r == (j % w) % r == head % r for w, r in branches)

    return multiplicity


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("branches", BRANCHES)
def test_dilated(branches, heads, causal):
    rates = BRANCHES[branches]
    for name, size in (("contiguous", 4), ("zigzag", 3), ("striped", 2), ("uneven", 5), ("mixed", 2)):
        layout, _ = deals(name, 17, 17, size)
        seen = visibility(keys=17, causal=causal, heads=heads[0], key_heads=heads[1])
        case = problem(layout, layout, seen, times(rates))
        assert max(case.defined().values()) <= len(rates)
        check(case, dilated_plans(layout, rates, seen))


def test_dilated_pairs_of_several_branches_count_more_than_once():
    layout = ringcore.contiguous(16, 4)
    seen = visibility(keys=16)
    plans = dilated_plans(layout, BRANCHES["nested"], seen)
    found = computed(problem(layout, layout, seen, times(BRANCHES["nested"])), plans)
    assert found[0, 0, 8, 8] == 3
    assert found[0, 0, 8, 12] == 1 + 1
    assert found[0, 1, 0, 0] == 1


def test_dilated_branches_within_shards_send_nothing():
    layout = ringcore.contiguous(32, 4)
    seen = visibility(keys=32, causal=True)
    assert check_exchanges(dilated_plans(layout, [(8, 2), (4, 1)], seen)).sent.total() == 0
    assert check_exchanges(dilated_plans(layout, [(8, 2), (16, 1)], seen)).sent.total() > 0


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_dilated_branches_of_any_layout(data):
    size, length = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 12))
    branch = st.tuples(st.integers(1, 14), st.integers(1, 4))
    branches = data.draw(st.lists(branch, min_size=1, max_size=3))
    heads, key_heads = data.draw(st.sampled_from([(2, 1), (3, 3), (6, 3)]))
    seen = visibility(keys=length, causal=data.draw(st.booleans()), offsets=(0,), heads=heads, key_heads=key_heads)
    layout = data.draw(layouts(length, size))
    check(problem(layout, layout, seen, times(branches)), dilated_plans(layout, branches, seen))


# Visiting queries: k and v stay, and every partial of q goes home.


@pytest.mark.parametrize("sight", [{}, {"causal": True}, {"window": (3, 1)}, {"causal": True, "offsets": (8, 3)}])
@pytest.mark.parametrize("name", DEALS)
def test_visiting_queries(name, sight):
    for size in SIZES:
        dealt = deals(name, 5, 17, size)
        seen = visibility(keys=17, **sight)
        check(problem(*dealt, seen, visitor="q"), visiting_query_plans(*dealt, seen))


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
        trace = check(problem(*dealt, seen), double_ring_plans(hosts, *dealt, seen))
        # The block that is read, the next one, and the next host's.
        assert trace.most_held <= 3


@pytest.mark.parametrize(("hosts", "inside"), HOSTS)
def test_double_rings_cross_between_hosts_as_little_as_can_be(hosts, inside):
    size = hosts * inside
    layout = ringcore.striped(2 * size, size)
    plans = double_ring_plans(hosts, layout, layout, visibility(keys=2 * size))
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
    check(problem(*dealt, seen), double_ring_plans(hosts, *dealt, seen))
