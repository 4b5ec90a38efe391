"""Plans where queries see keys near them, or of their document: exact, and no row travels that is not read."""

from dataclasses import replace

import pytest
from checking import SIZES, check
from deals import DEALS, deals, layouts, problem, visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import check_exchanges

import ringcore
from ringcore import Band, Documents
from ringcore.schedule import halo_plans, ring_plans

# Packed documents: a query sees keys of its own document.

DOCUMENTS = {
    "two batch entries": [[0] * 5 + [1] * 3 + [2] * 9, [0] * 16 + [1]],
    "one each": [list(range(17))] * 2,
    "in turn": [[0, 1, 2] * 5 + [0, 1], [3, 3, 8, 8, 8, 3, 3, 3, 8, 3, 8, 8, 0, 0, 3, 3, 3]],
}


def document_case(q_layout, k_layout, seen, documents):
    def same(b, h, i, j):
        return documents[b][i + seen.offsets[b]] == documents[b][j]

    return problem(q_layout, k_layout, seen, same)


def with_documents(seen, documents):
    return replace(seen, documents=Documents.from_ids(documents).runs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", DOCUMENTS)
@pytest.mark.parametrize("name", DEALS)
def test_documents(name, packed, causal):
    documents = DOCUMENTS[packed]
    seen = visibility(keys=17, causal=causal)
    for size in SIZES:
        dealt = deals(name, 17, 17, size)
        check(document_case(*dealt, seen, documents), ring_plans(*dealt, with_documents(seen, documents)))


def test_documents_and_queries_that_begin_later():
    documents = [[0] * 6 + [1] * 5 + [2] * 6, [0] * 17]
    seen = visibility(queries=9, keys=17, window=(4, None), offsets=(3, 8), key_limits=(17, 12))
    for size in SIZES:
        dealt = deals("zigzag", 9, 17, size)
        check(document_case(*dealt, seen, documents), ring_plans(*dealt, with_documents(seen, documents)))


def test_documents_within_shards_send_nothing():
    layout = ringcore.contiguous(24, 4)
    seen = with_documents(visibility(keys=24, offsets=(0,)), [[i // 3 for i in range(24)]])
    plans = ring_plans(layout, layout, seen)
    assert check_exchanges(plans).sent.total() == 0


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_documents_of_any_boundaries(data):
    size, length = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 12))
    documents = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=2)
    )
    seen = visibility(keys=length, causal=data.draw(st.booleans()), offsets=(0,) * len(documents))
    seen = replace(seen, joined=data.draw(st.booleans()))
    dealt = data.draw(layouts(length, size)), data.draw(layouts(length, size))
    check(document_case(*dealt, seen, documents), ring_plans(*dealt, with_documents(seen, documents)))


def test_tiles_are_no_more_than_what_documents_share():
    """One tile for each document that two shards share, under a causal band where it must be."""
    layout = ringcore.contiguous(12, 2)
    seen = with_documents(visibility(keys=12, causal=True, offsets=(0,)), [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2])
    first, second = ring_plans(layout, layout, seen)
    assert [(t.rows, t.columns, t.band) for t in first.tiles] == [
        (slice(0, 3, 1), slice(0, 3, 1), Band(None, 0)),
        (slice(3, 6, 1), slice(3, 6, 1), Band(None, 0)),
    ]
    assert [(t.rows, t.columns, t.band) for t in second.tiles] == [
        (slice(0, 2, 1), slice(0, 2, 1), Band(None, 0)),
        (slice(2, 6, 1), slice(2, 6, 1), Band(None, 0)),
        (slice(0, 2, 1), slice(0, 3, 1), Band()),
    ]
    assert [move.rows for step in first.steps for move in step.sends] == [range(3, 6)], "of its last document alone"


# Which of the two ways is taken.


def test_the_way_that_moves_less_is_taken():
    around = replace(visibility(keys=24, causal=True, offsets=(0,)), window=(None, None))
    for name, seen, straight in (
        ("contiguous", replace(around, window=(3, None)), True),
        ("contiguous", around, False),
        ("striped", replace(around, causal=False, window=(12, 12)), False),
        ("contiguous", with_documents(around, [i // 5 for i in range(24)]), True),
        ("contiguous", with_documents(around, [0] * 24), False),
    ):
        layout = ringcore.resolve_layout(name, 24, 4)
        plans = ring_plans(layout, layout, seen)
        assert (plans == halo_plans(layout, layout, seen)) == straight, (name, seen)


# Halos: only the keys that a window reaches travel, straight from their owner.


@pytest.mark.parametrize(
    "sight",
    [
        {"window": (5, 2)},
        {"window": (0, 0)},
        {"causal": True, "window": (9, None)},
        {"causal": True},
        {"offsets": (4, 4), "window": (2, 1)},
    ],
)
@pytest.mark.parametrize("name", DEALS)
def test_halos(name, sight):
    for size in SIZES:
        dealt = deals(name, 17, 17, size)
        seen = visibility(keys=17, **sight)
        case, plans = problem(*dealt, seen), halo_plans(*dealt, seen)
        check(case, plans)
        read = {(rank, key) for _, _, i, key in case.defined() for rank in range(size) if i in case.rows[rank]}
        for plan in plans:
            for move in (move for step in plan.steps for move in step.receives):
                # No shorter run of rows would do.
                assert {(plan.rank, case.keys[move.block][row]) for row in (move.rows[0], move.rows[-1])} <= read


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_halos_send_the_rows_that_the_window_reaches(size):
    layout = ringcore.contiguous(6 * size, size)
    plans = halo_plans(layout, layout, visibility(keys=6 * size, causal=True, window=(4, None)))
    for plan in plans:
        moves = [move for step in plan.steps for move in step.sends]
        assert [(move.peer, move.rows) for move in moves] == [(plan.rank + 1, range(2, 6))] * (plan.rank < size - 1)


def test_halos_reach_over_short_shards():
    layout = ringcore.from_lengths([4, 1, 0, 2, 5])
    plans = halo_plans(layout, layout, visibility(keys=12, window=(4, 0)))
    came = {(plan.rank, m.block): m.rows for plan in plans for step in plan.steps for m in step.receives}
    assert came == {
        (1, 0): range(0, 4),
        (3, 0): range(1, 4),
        (3, 1): range(0, 1),
        (4, 0): range(3, 4),
        (4, 1): range(0, 1),
        (4, 3): range(0, 2),
    }


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_halos_of_any_layouts(data):
    size, queries, keys = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10))
    dealt = data.draw(layouts(queries, size)), data.draw(layouts(keys, size))
    side = st.none() | st.integers(0, 5)
    seen = visibility(keys=keys, causal=data.draw(st.booleans()), window=(data.draw(side), data.draw(side)))
    check(problem(*dealt, seen), halo_plans(*dealt, seen))
    check(problem(*dealt, seen), ring_plans(*dealt, seen))
