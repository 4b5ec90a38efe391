"""What equal calls remember of each other, and what they must not."""

import numpy as np
import pytest

import ringcore
from ringcore import remembered
from ringcore.call import Call


@pytest.fixture
def chosen(monkeypatch):
    """One entry for each time that kernels were chosen."""
    found = []
    choose = Call.choose
    monkeypatch.setattr(Call, "choose", lambda self, *arrays: found.append(self) or choose(self, *arrays))
    return found


def draw(rows=7, dtype=np.float64):
    return [np.random.default_rng(seed).standard_normal((1, 2, rows, 4)).astype(dtype) for seed in range(3)]


def dense(q, k, v):
    weights = np.exp(q @ k.swapaxes(2, 3) / 2)
    return weights @ v / weights.sum(-1, keepdims=True)


def test_a_second_call_chooses_nothing_and_is_right(chosen):
    for attempt in range(3):
        arrays = [x + attempt for x in draw(rows=11)]
        out = ringcore.ring_attention(*arrays, ring_size=3, scale=0.5)
        np.testing.assert_allclose(out, dense(*arrays), rtol=1e-12)
    assert len(chosen) == 1


@pytest.mark.parametrize("changed", [
    {"rows": 13}, {"dtype": np.float32}, {"causal": True}, {"window": (3, None)}, {"window": [3, None]}, {"scale": 1.0},
    {"ring_size": 2}, {"layout": "zigzag"}, {"kernels": "reference"}, {"query_offset": 1}, {"query_offset": (1,)},
], ids=str)  # fmt: skip
def test_another_call_is_another_choice(chosen, changed):
    first = {"rows": 12, "scale": 0.25}
    for keywords in (first, first | changed):
        keywords = dict(keywords)
        arrays = draw(**{name: keywords.pop(name) for name in ("rows", "dtype") if name in keywords})
        ringcore.ring_attention(*arrays, **keywords)
    before = len(chosen)
    assert before
    ringcore.ring_attention(*arrays, **keywords)
    assert len(chosen) == before


@pytest.mark.parametrize(("right", "wrong"), [
    ({"causal": True}, {"causal": 1}), ({"ring_size": 1}, {"ring_size": True}), ({"window": (1, 1)}, {"window": (True, 1)}),
    ({"query_offset": 1}, {"query_offset": 1.0}),
], ids=str)  # fmt: skip
def test_what_is_equal_but_of_another_kind_is_refused_all_the_same(right, wrong):
    arrays = draw(rows=14)
    ringcore.ring_attention(*arrays, **right)
    with pytest.raises(ringcore.KeywordError):
        ringcore.ring_attention(*arrays, **wrong)


def test_long_arrays_of_numbers_are_told_apart():
    q, k, v = (np.repeat(x, 3000, axis=0) for x in draw(rows=2))
    lengths = np.full(3000, 2)
    first = ringcore.ring_attention(q, k, v, key_lengths=lengths)
    lengths[1500] = 1  # which its text leaves out
    second = ringcore.ring_attention(q, k, v, key_lengths=lengths)
    assert not np.array_equal(first[1500], second[1500])
    np.testing.assert_allclose(second[1500], np.broadcast_to(v[1500, :, :1], second[1500].shape))


@pytest.mark.parametrize("made", [np.array, list, ringcore.Documents.from_ids], ids=["array", "list", "Documents"])
def test_a_call_with_other_documents_is_another_call(made):
    q, k, v = draw()
    length = q.shape[2]
    for cut in (2, 5):
        ids = [int(position >= cut) for position in range(length)]
        mask = np.equal.outer(ids, ids)
        for _ in range(2):
            out = ringcore.ring_attention(q, k, v, documents=made(ids))
            np.testing.assert_allclose(out, ringcore.ring_attention(q, k, v, mask=mask), atol=1e-14)


def test_documents_that_change_in_place_are_read_anew():
    q, k, v = draw()
    ids = np.zeros(q.shape[2], int)
    first = ringcore.ring_attention(q, k, v, documents=ids)
    ids[3:] = 1
    assert not np.array_equal(first, ringcore.ring_attention(q, k, v, documents=ids))


def test_a_full_memory_forgets_for_what_is_new_alone(chosen):
    lengths = [100 + n for n in range(remembered._KEPT)]
    for rows in (*lengths, *lengths):
        ringcore.ring_attention(*draw(rows=rows), scale=0.75)
    assert len(chosen) == len(lengths)
    for rows in (99, 100):
        ringcore.ring_attention(*draw(rows=rows), scale=0.75)
    assert len(chosen) == len(lengths) + 2


def test_a_full_memory_of_a_ring_forgets_for_new_keywords_alone():
    class Ring:
        """Of which a weak reference can be had."""

    ring, other = Ring(), Ring()
    scales = range(remembered._KEPT)
    of_other = remembered.memory_of({"scale": 0}, other)
    memories = [remembered.memory_of({"scale": scale}, ring) for scale in scales]
    assert all(memory is remembered.memory_of({"scale": scale}, ring) for scale, memory in enumerate(memories))
    remembered.memory_of({"scale": -1}, ring)
    assert memories[0] is not remembered.memory_of({"scale": 0}, ring)
    assert of_other is remembered.memory_of({"scale": 0}, other)


def test_what_is_kept_already_makes_nothing_be_forgotten():
    kept = dict.fromkeys(range(remembered._KEPT))
    remembered.keep(kept, 3, "another value")
    assert len(kept) == remembered._KEPT
    assert kept[3] == "another value"
    remembered.keep(kept, -1, "new")
    assert kept == {-1: "new"}
