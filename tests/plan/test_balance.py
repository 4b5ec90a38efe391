"""Layouts by the work that plans give: even, exact, and the same on every rank."""

import numpy as np
import pytest
from deals import SIGHTS, deals, problem, visibility
from hypothesis import given
from hypothesis import strategies as st
from packed import log_normal_documents
from pairs import computed, shown

import ringcore
from ringcore import Band, KeywordError, LayoutError, Tile, balanced
from ringcore.balance import loads, pairs
from ringcore.call import Call
from ringcore.schedule import ring_plans
from ringcore.tiling import Visibility

LENGTH, SIZE = 131_072, 8


def seen(layout, *, causal=False, window=(None, None), cu_seqlens=None):
    documents = None if cu_seqlens is None else ringcore.Documents.from_cu_seqlens(cu_seqlens).of_entries(1)
    window = (window - 1, 0) if isinstance(window, int) else window
    visible = Visibility(causal, window, (0,), (LENGTH,), heads=1, key_heads=1, documents=documents)
    return loads(ring_plans(layout, layout, visible))


def unevenness(layout, **keywords):
    found = seen(layout, **keywords)
    return max(found) / (sum(found) / len(found))


CALLS = {
    "all": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": 4096},
    "window": {"window": (1000, 3000)},
    "documents seen whole": {"cu_seqlens": log_normal_documents(9)},
    **{f"documents {seed}": {"causal": True, "cu_seqlens": log_normal_documents(seed)} for seed in range(6)},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_most_loaded_rank_has_little_more_than_the_mean(call):
    layout = balanced(LENGTH, SIZE, **CALLS[call])
    assert unevenness(layout, **CALLS[call]) <= 1.05
    assert max(map(len, layout.shards)) <= 8
    assert set(layout.lengths) == {LENGTH // SIZE}


def test_documents_leave_named_layouts_uneven():
    uneven = [unevenness(ringcore.zigzag(LENGTH, SIZE), **CALLS[f"documents {seed}"]) for seed in range(6)]
    assert min(uneven) > 1.3


def test_no_more_pieces_than_help():
    assert balanced(LENGTH, SIZE).shards == ringcore.contiguous(LENGTH, SIZE).shards
    halves, due = balanced(LENGTH, SIZE, causal=True, pieces=2), ringcore.zigzag(LENGTH, SIZE)
    assert {frozenset(halves.positions(rank)) for rank in range(SIZE)} == {
        frozenset(due.positions(rank)) for rank in range(SIZE)
    }


@given(st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.integers(1, 7), st.integers(1, 7))
def test_pairs_of_a_tile_are_those_of_its_band(lo, hi, height, width):
    if lo is not None and hi is not None and lo > hi:
        lo, hi = hi, lo
    rows = range(height), range(width)
    tile = Tile(slice(1, 4), *[slice(0, 1)] * 2, *[slice(0, 1)] * 2, (rows[0],), (rows[1],), Band(lo, hi))
    assert pairs(tile) == 3 * sum(1 for _ in shown(tile))


@pytest.mark.parametrize("sight", SIGHTS)
def test_loads_are_what_plans_compute(sight):
    keywords = SIGHTS[sight]
    visible = visibility(**keywords)
    dealt = deals("mixed", keywords.get("queries", 13), keywords.get("keys", 13), 3)
    plans = ring_plans(*dealt, visible)
    count = sum(computed(problem(*dealt, visible), plans).values())
    assert sum(loads(plans, launch=0)) * visible.heads == count


@pytest.mark.parametrize("length", [0, 1, 5, 37])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_attention_is_the_same(length, size):
    q, k, v = np.random.default_rng(length).standard_normal((3, 2, 2, length, 4))
    documents = [[i // 7 for i in range(length)], [i // 11 for i in range(length)]]
    keywords = {"causal": True, "documents": documents if length else None}
    layout = balanced(length, size, **keywords, pieces=3, launch=0)
    assert layout == balanced(length, size, **keywords, pieces=3, launch=0)
    assert max(layout.lengths) - min(layout.lengths) <= 3
    out = ringcore.ring_attention(q, k, v, ring_size=size, layout=layout, **keywords)
    np.testing.assert_allclose(out, ringcore.ring_attention(q, k, v, **keywords), atol=1e-13)


@pytest.mark.parametrize(
    ("keywords", "error", "said"),
    [
        ({"size": 0}, KeywordError, "size is 0; it must be a whole number, 1 or more"),
        ({"length": -1}, KeywordError, "length is -1"),
        ({"length": 2.0}, KeywordError, "length is 2.0"),
        ({"pieces": 0}, KeywordError, "pieces is 0"),
        ({"launch": 0.5}, KeywordError, "launch is 0.5"),
        ({"causal": 1}, KeywordError, "causal is 1"),
        ({"window": 3}, KeywordError, "causal=True only"),
        ({"documents": [0, 1]}, LayoutError, "the documents end at position 2, but the layout is of 6"),
        ({"documents": [[0] * 6] * 2, "key_lengths": [1, 2, 3]}, KeywordError, "key_lengths has 3 entries"),
    ],
)
def test_bad_input_is_refused(keywords, error, said):
    with pytest.raises(error, match=said):
        balanced(**{"length": 6, "size": 2, **keywords})


def test_auto_has_the_least_work_of_all():
    rng = np.random.default_rng(3)
    ids = np.repeat(np.arange(12), rng.integers(1, 60, 12))
    for keywords in ({}, {"causal": True}, {"causal": True, "documents": ids}, {"window": (9, 3)}):
        given = {"causal": False, "window": None, **keywords}
        call = Call(
            "test", ring=None, ring_size=4, scale=None, softcap=None, query_offset=0, key_lengths=None, layout="auto",
            axes="bhsd", kernels=None, **given,
        )  # fmt: skip
        x = np.zeros((1, 1, len(ids), 2))
        deal = call.prepare(ringcore.Inputs(x, x, x)).session.deal
        least = max(loads(deal.plans))
        for name in ("contiguous", "zigzag", "striped"):
            layout = ringcore.resolve_layout(name, len(ids), 4)
            assert least <= max(loads(ring_plans(layout, layout, deal.visibility)))
        out = ringcore.ring_attention(
            *(rng.standard_normal(x.shape) for _ in range(3)), ring_size=4, layout="auto", **keywords
        )
        assert out.shape == x.shape


def test_auto_for_other_lengths_of_q_and_k():
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, 2, length, 4)) for length in (9, 31, 31))
    due = ringcore.ring_attention(q, k, v, causal=True, query_offset=22)
    out = ringcore.ring_attention(q, k, v, causal=True, query_offset=22, ring_size=3, layout="auto")
    assert np.abs(out - due).max() < 1e-12
