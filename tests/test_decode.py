"""Decoding: new queries over a cache whose positions are dealt to ranks, against dense attention."""

import math
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from given import refused, torch

import ringcore
from ringcore import KeywordError, LayoutError, UnsupportedError, decode_attention, decoding
from ringcore.schedule import query_plans, ring_plans
from ringcore.tiling import Visibility
from ringcore.values import Finish
from ringcore.visiting_queries import QueryWork

sys.path.append(str(Path(__file__).parent / "conformance"))

from oracle import dense

BATCH, HEADS, KEY_HEADS, ROOM = 2, 4, 2, 23
RNG = np.random.default_rng(5)
K, V = (RNG.standard_normal((BATCH, KEY_HEADS, ROOM, width)) for width in (6, 5))
CALLS = {
    "full": {},
    "growing": {"key_lengths": [17, 4]},
    "an entry with its queries alone": {"key_lengths": [3, 9]},
    "window": {"key_lengths": [20, 11], "window": (4, 0)},
    "softcap and scale": {"softcap": 1.5, "scale": 0.7, "key_lengths": [20, 11]},
    "not causal": {"causal": False, "key_lengths": [20, 11]},
    "at other positions": {"query_offset": [5, 0]},
    "sinks": {"sinks": RNG.standard_normal(HEADS), "key_lengths": [9, 23]},
}


def expected(q, keywords):
    """out and lse, by attention over the whole cache."""
    rows = q.shape[2]
    lengths = keywords.get("key_lengths", [ROOM] * BATCH)
    offsets = keywords.get("query_offset", [length - rows for length in lengths])
    truth = dense(
        q,
        K,
        V,
        {"causal": True, **keywords, "query_offset": offsets},
        np.zeros((*q.shape[:3], 5)),
        np.zeros(q.shape[:3]),
    )
    return truth.out, truth.lse


def poisoned(x, lengths):
    """What is not filled holds NaN."""
    x = x.copy()
    for entry, length in enumerate(lengths):
        x[entry, :, length:] = np.nan
    return x


@pytest.mark.parametrize("kernels", ["numpy", "reference"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_attention_over_the_whole_cache(name, layout, rows, kernels):
    keywords = CALLS[name]
    q = np.random.default_rng(rows).standard_normal((BATCH, HEADS, rows, 6))
    due, due_lse = expected(q, keywords)
    k, v = (poisoned(x, keywords.get("key_lengths", [ROOM] * BATCH)) for x in (K, V))
    for size in range(1, 9):
        out, lse = decode_attention(q, k, v, ring_size=size, layout=layout, kernels=kernels, **keywords)
        np.testing.assert_allclose(out, due, atol=1e-12)
        np.testing.assert_allclose(lse, due_lse, atol=1e-12)


def test_a_cache_that_grows_gives_what_the_whole_sequence_does():
    q = RNG.standard_normal((BATCH, HEADS, ROOM, 6))
    due = ringcore.ring_attention(q, K, V, causal=True)
    for length in range(1, ROOM + 1):
        new = slice(length - 1, length)
        out, _ = decode_attention(q[:, :, new], K, V, key_lengths=[length] * BATCH, ring_size=4, layout="striped")
        np.testing.assert_allclose(out, due[:, :, new], atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 9])
@pytest.mark.parametrize("layouts", [("contiguous", "striped"), ("zigzag", "contiguous"), ("striped", "zigzag")])
@pytest.mark.parametrize("name", CALLS)
def test_queries_that_are_dealt_too(name, layouts, rows, monkeypatch):
    keywords = CALLS[name]
    q = np.random.default_rng(rows).standard_normal((BATCH, HEADS, rows, 6))
    if rows > min(keywords.get("key_lengths", [ROOM])):
        return
    due, due_lse = expected(q, keywords)
    k, v = (poisoned(x, keywords.get("key_lengths", [ROOM] * BATCH)) for x in (K, V))
    q_layout, layout = layouts
    for size, queries_visit in product(range(1, 9), (True, False)):
        monkeypatch.setattr(decoding, "bytes_of_queries", lambda *_, few=queries_visit: -1 if few else 1 << 60)
        out, lse = decode_attention(q, k, v, ring_size=size, layout=layout, q_layout=q_layout, **keywords)
        np.testing.assert_allclose(out, due, atol=1e-12)
        np.testing.assert_allclose(lse, due_lse, atol=1e-12)


def test_what_moves_fewer_bytes_visits():
    """The formula, and that the works move no more and no less."""
    k_layout = ringcore.resolve_layout("striped", ROOM, 4)
    seen = Visibility(False, (None, None), (0,) * BATCH, (ROOM,) * BATCH, HEADS, KEY_HEADS)
    for rows, few in ((4, True), (16, False)):
        q = np.zeros((BATCH, HEADS, rows, 6))
        q_layout = ringcore.resolve_layout("contiguous", rows, 4)
        plans = query_plans(q_layout, k_layout, seen), ring_plans(q_layout, k_layout, seen)
        of_queries = decoding.bytes_of_queries(plans[0], q_layout, q, V)
        of_keys = decoding.bytes_of_keys(plans[1], k_layout, K, V)
        # Each row of q visits three other ranks; its partial goes on from each of them, the last time home.
        assert of_queries == 3 * rows * BATCH * HEADS * (6 + 5 + 2) * 8
        assert of_keys == 3 * ROOM * BATCH * KEY_HEADS * (6 + 5) * 8
        assert (of_queries < of_keys) is few
        works = [
            QueryWork(x, K, V, None, score=None, kernels=None, lengths=q_layout.lengths, arithmetic=None)
            for x in (ringcore.shard(q, q_layout, rank, 4) for rank in range(4))
        ]
        sent = sum(
            sum(math.prod(spec.shape) * 8 for spec in specs(move))
            for plan, work in zip(plans[0], works, strict=True)
            for step in plan.steps
            for moves, specs in ((step.sends, work.visiting_specs), (step.carry_out, work.carried_specs))
            for move in moves
        )
        assert sent == of_queries


@pytest.mark.parametrize(
    "keywords", [{"key_lengths": [33], "causal": False}, {"key_lengths": [42], "window": 12}, {"query_offset": 38}]
)
def test_what_is_fetched_of_visiting_queries_is_all_that_is_read(keywords, monkeypatch):
    """A transport that reads in place gives rows that no tile reads as it likes: here NaN."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, 2, rows, 4)) for rows in (8, 64, 64))
    planned, travels, made = [], decoding._travels, decoding.run_local

    def run(loops):
        return made([poisoning(loop, plan) for loop, plan in zip(loops, planned[0], strict=True)])

    def poisoning(loop, plan):
        reply = None
        while True:
            try:
                request = loop.send(reply)
            except StopIteration as stop:
                return stop.value
            reply = yield request
            if isinstance(request, Finish) and request.token[0] == "visiting":
                rows = {move: plan.seen(move.block, move.rows) for move in reply}
                reply = {move: tuple(seen_of(x, rows[move]) for x in blocks) for move, blocks in reply.items()}

    def seen_of(x, rows):
        found = np.full_like(x, np.nan)
        found[:, :, rows] = x[:, :, rows]
        return found

    def noted(*given):
        planned.append(travels(*given)[0])
        return travels(*given)

    monkeypatch.setattr(decoding, "_travels", noted)
    monkeypatch.setattr(decoding, "run_local", run)
    monkeypatch.setattr(decoding, "bytes_of_queries", lambda *_: -1)
    out, _ = decode_attention(q, k, v, ring_size=2, q_layout="contiguous", **keywords)
    monkeypatch.undo()
    np.testing.assert_allclose(out, decode_attention(q, k, v, **keywords)[0], atol=1e-12)


def test_many_queries_exchange_partials_in_parts(monkeypatch):
    monkeypatch.setattr(decoding, "_MOST", 100)
    own = ringcore.empty_partial(np.zeros((1, 2, 9, 3)), 4)
    parts = decoding._in_rows(own, 2)
    assert [part.maximum.shape[2] for part in parts] == [4, 4, 1]
    assert decoding._in_rows(own, 1) == [own]


def test_axes_and_half_types():
    q = RNG.standard_normal((BATCH, HEADS, 2, 6))
    due, _ = expected(q, {})
    swapped = [np.swapaxes(x, 1, 2).astype("float16") for x in (q, K, V)]
    out, lse = decode_attention(*swapped, axes="bshd", ring_size=3)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(np.swapaxes(out, 1, 2).astype(float), due, atol=5e-3)


def test_torch_tensors():
    t = torch()
    q = RNG.standard_normal((BATCH, HEADS, 1, 6))
    out, _ = decode_attention(*(t.from_numpy(x) for x in (q, K, V)), ring_size=3, layout="striped")
    np.testing.assert_allclose(out.numpy(), expected(q, {})[0], atol=1e-12)
    assert out.is_contiguous()
    leaf = t.from_numpy(q).requires_grad_()
    refused(lambda: decode_attention(leaf, *map(t.from_numpy, (K, V))), UnsupportedError, ["q requires grad"])


def test_bad_input():
    q = np.zeros((BATCH, HEADS, 3, 6))
    refused(lambda: decode_attention(q, K, V, key_lengths=[5, 30]), KeywordError, ["30 for batch entry 1", "only 23"])
    refused(lambda: decode_attention(q, K, V, key_lengths=[5, 2]), KeywordError, ["q has 3 rows", "entry 1 has 2 keys"])
    refused(lambda: decode_attention(q, K, V, layout="auto"), LayoutError, ["a cache lies where it was written"])
    refused(lambda: decode_attention(q, K, V, q_layout="auto"), LayoutError, ["q_layout", "a cache lies where"])
    refused(lambda: decode_attention(q, K, V, q_layout="twisted"), LayoutError, ["q_layout is 'twisted'"])
    of_four = ringcore.resolve_layout("striped", 4, 2)
    refused(lambda: decode_attention(q, K, V, q_layout=of_four, ring_size=2), LayoutError, ["deals 4", "q has 3"])
