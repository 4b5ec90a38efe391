"""Diagnoses: every disease is told by its name, right attention has none, and what is unknown is said to be so."""

import numpy as np
import pytest

import ringcore
from ringcore.testing import DISEASES, Dealt, Observation, Problem, diagnose, given_by, right
from ringcore.testing.diagnosis import NAMES, UNKNOWN

LENGTH = 14


def problem(causal, heads=4, key_heads=2, sinks=False, empty=False, seed=0, softcap=None, documents=False):
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((1, h, LENGTH, 4)) for h in (heads, key_heads, key_heads, heads))
    sees = np.tril(np.ones((LENGTH, LENGTH), bool)) if causal else np.ones((LENGTH, LENGTH), bool)
    if empty:
        sees[3] = False
    if documents:
        sees[9:, :9] = False
    sinks = rng.standard_normal(heads) if sinks else None
    return Problem(2 * q, k, v, dout, 0.7, sees[None, None], softcap=softcap, sinks=sinks)


PROBLEMS = [
    problem(False),
    problem(True),
    problem(True, sinks=True, seed=1),
    problem(False, heads=2, seed=2),
    problem(False, empty=True, seed=3),
    problem(False, softcap=1.5, seed=4),
    problem(True, documents=True, seed=5),
]


def observed(answer_of, sizes=(2, 3, 4), names=NAMES):
    """What an implementation gives: ``answer_of(problem, dealt)``; rounded as float32 rounds."""
    found = []
    for size in sizes:
        dealt = Dealt.contiguous(LENGTH, LENGTH, size)
        for each in PROBLEMS:
            answer = answer_of(each, dealt)
            given = {name: getattr(answer, name) for name in names}
            rounded = {name: x.astype("float32").astype(float) for name, x in given.items() if x is not None}
            found.append(Observation(each, dealt, rounded))
    return found


@pytest.mark.parametrize("disease", DISEASES, ids=lambda disease: disease.name)
def test_every_disease_is_told_by_its_name_alone(disease):
    (found,) = diagnose(observed(lambda each, dealt: given_by(disease, each, dealt)))
    assert found.disease is disease
    assert found.fit < 1e-5 < 1e-3 < found.error
    assert set(found.sizes) <= {2, 3, 4}


def test_right_attention_has_no_disease():
    assert diagnose(observed(lambda each, dealt: right(each), sizes=(1, 2, 3, 4, 8))) == []


def test_what_is_like_no_disease_is_said_to_be_unknown():
    def answer(each, dealt):
        return type(right(each))(*(1.5 * getattr(right(each), name) for name in NAMES))

    (found,) = diagnose(observed(answer))
    assert found.disease is UNKNOWN
    assert found.results == NAMES


def test_out_alone_tells_what_out_shows():
    for disease in DISEASES:
        seen = observed(lambda each, dealt, disease=disease: given_by(disease, each, dealt), names=("out",))
        found = diagnose(seen)
        assert [each.disease for each in found] in ([disease], [])
        assert bool(found) == (
            disease.weights is not None or any(word in disease.name for word in ("heads", "NaN", "softcap"))
        )


@pytest.mark.parametrize("words", ["stale k and v", "one rank off", "not carried home"])
def test_mistakes_between_ranks_are_none_on_a_ring_of_one(words):
    diseases = [disease for disease in DISEASES if words in disease.name]
    assert diseases
    for disease in diseases:
        assert diagnose(observed(lambda each, dealt, disease=disease: given_by(disease, each, dealt), (1,))) == []


def test_two_diseases_that_nothing_tells_apart_are_both_named():
    off = [disease for disease in DISEASES if "one rank off" in disease.name]
    found = diagnose(observed(lambda each, dealt: given_by(off[0], each, dealt), sizes=(2,)))
    assert [each.disease for each in found] == off


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_original_reports_algorithm_is_told(size):
    """As it was described: each chunk of keys is softmaxed on its own, and the results are added up."""

    def attention(q, k, v, scale):
        out = np.zeros((*q.shape[:3], v.shape[3]))
        for keys, values in zip(np.array_split(k, size, axis=2), np.array_split(v, size, axis=2), strict=True):
            scores = np.einsum("bhid,bhjd->bhij", q, keys) * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out += weights / weights.sum(-1, keepdims=True) @ values
        return out

    each = problem(False, heads=2, seed=4)
    given = {"out": attention(each.q, each.k, each.v, each.scale)}
    (found,) = diagnose([Observation(each, Dealt.contiguous(LENGTH, LENGTH, size), given)])
    assert found.disease.name == "softmax per chunk, summed over chunks"
    assert found.sizes == (size,)
    ones = Problem(each.q, each.k, np.ones_like(each.v), each.dout, each.scale, each.sees)
    np.testing.assert_allclose(attention(ones.q, ones.k, ones.v, ones.scale), size)  # the sum of weights


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_ringcore_is_healthy(layout):
    def answer(each, dealt):
        keywords = {
            "scale": each.scale,
            "softcap": each.softcap,
            "sinks": each.sinks,
            "ring_size": dealt.size,
            "layout": layout,
        }
        sees = np.broadcast_to(each.sees, (1, 1, LENGTH, LENGTH))
        (out, _), pullback = ringcore.ring_attention_vjp(each.q, each.k, each.v, mask=sees, **keywords)
        return type(right(each))(out, *pullback(each.dout))

    assert diagnose(observed(answer), tolerance=1e-5) == []
