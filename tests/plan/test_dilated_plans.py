"""Plans of dilated attention: exact, as often as branches say, and nothing travels that no rank reads."""

from dataclasses import replace

import pytest
from checking import check
from deals import deals, layouts, problem, visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import check_exchanges
from pairs import computed

import ringcore
from ringcore.balance import pairs
from ringcore.dilation import HEAD_OFFSETS, Dilation, common, segments_of
from ringcore.schedule import ring_plans

BRANCHES = {
    "one dense": [(64, 1)],
    "nested": [(4, 1), (8, 2), (16, 4)],
    "segments that do not divide": [(5, 2), (7, 3)],
    "rate beyond its segment": [(3, 5), (16, 2)],
    "twice the same": [(6, 2), (6, 2)],
}


def dilated(seen, branches, head_offset="modulo"):
    return replace(seen, dilation=Dilation(tuple(branches), head_offset))


def times(branches, heads, head_offset="modulo"):
    """m[h, i, j]: in how many branches head h pairs i and j."""

    def offset(head, rate):
        return head % rate if head_offset == "modulo" else head // -(-heads // rate)

    def multiplicity(entry, head, i, j):
        return sum(i // w == j // w and (i % w) % r == (j % w) % r == offset(head, r) for w, r in branches)

    return multiplicity


@pytest.mark.parametrize("head_offset", HEAD_OFFSETS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("branches", BRANCHES)
def test_dilated(branches, heads, causal, head_offset):
    rates = BRANCHES[branches]
    for name, size in (("contiguous", 4), ("zigzag", 3), ("striped", 2), ("uneven", 5), ("mixed", 2)):
        layout, _ = deals(name, 17, 17, size)
        seen = visibility(keys=17, causal=causal, heads=heads[0], key_heads=heads[1])
        case = problem(layout, layout, seen, times(rates, heads[0], head_offset))
        assert max(case.defined().values()) <= len(rates)
        check(case, ring_plans(layout, layout, dilated(seen, rates, head_offset)))


def test_pairs_of_several_branches_count_more_than_once():
    layout = ringcore.contiguous(16, 4)
    seen = visibility(keys=16)
    plans = ring_plans(layout, layout, dilated(seen, BRANCHES["nested"]))
    found = computed(problem(layout, layout, seen, times(BRANCHES["nested"], 2)), plans)
    assert found[0, 0, 8, 8] == 3
    assert found[0, 0, 8, 12] == 1 + 1
    assert found[0, 1, 0, 0] == 1


def test_branches_within_shards_send_nothing():
    layout = ringcore.contiguous(32, 4)
    seen = visibility(keys=32, causal=True)
    assert check_exchanges(ring_plans(layout, layout, dilated(seen, [(8, 2), (4, 1)]))).sent.total() == 0
    assert check_exchanges(ring_plans(layout, layout, dilated(seen, [(8, 2), (16, 1)]))).sent.total() > 0


def test_only_rows_that_a_later_rank_reads_are_sent():
    """A segment of 10 positions reaches over the end of a shard of 8: the first rank's rows 0 to 7 go, no other."""
    layout = ringcore.contiguous(32, 4)
    plans = ring_plans(layout, layout, dilated(visibility(keys=32, causal=True), [(10, 1)]))
    sent = {(plan.rank, move.peer): move.rows for plan in plans for step in plan.steps for move in step.sends}
    assert sent == {(0, 1): range(8), (1, 2): range(2, 8), (2, 3): range(4, 8)}


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_branches_of_any_layout(data):
    size, length = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 12))
    branch = st.tuples(st.integers(1, 14), st.integers(1, 4))
    branches = data.draw(st.lists(branch, min_size=1, max_size=3))
    heads, key_heads = data.draw(st.sampled_from([(2, 1), (3, 3), (6, 3), (8, 2)]))
    head_offset = data.draw(st.sampled_from(HEAD_OFFSETS))
    seen = visibility(keys=length, causal=data.draw(st.booleans()), offsets=(0,), heads=heads, key_heads=key_heads)
    layout = data.draw(layouts(length, size))
    case = problem(layout, layout, seen, times(branches, heads, head_offset))
    check(case, ring_plans(layout, layout, dilated(seen, branches, head_offset)))


@pytest.mark.parametrize("size", [1, 4])
def test_visible_pairs_are_those_of_equation_17(size):
    """2 N d sum(w / r^2) of two products of 2 d each, per head: w / r keys for each of N / r queries of a branch."""
    length, heads = 64, 8
    branches = [(8, 1), (16, 2), (32, 4), (64, 8)]
    layout = ringcore.contiguous(length, size)
    seen = dilated(visibility(keys=length, offsets=(0,), heads=heads, key_heads=heads), branches)
    tiles = [tile for plan in ring_plans(layout, layout, seen) for step in plan.steps for tile in step.tiles]
    counted = sum(pairs(tile) * tile.heads for tile in tiles)
    assert counted == heads * sum(length * w // r**2 for w, r in branches)


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_ranges_have_in_common(data):
    one, other = (
        range(start, start + data.draw(st.integers(0, 40)), data.draw(st.integers(1, 9)))
        for start in (data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20)))
    )
    assert list(common(one, other)) == [place for place in one if place in other]
    assert segments_of([one, other], 7) == {place // 7 for place in (*one, *other)}
