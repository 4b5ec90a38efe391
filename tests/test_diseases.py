"""Diagnoses: every disease is told by its name, right attention has none, and what is unknown is said to be so."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import ringcore
from ringcore.layout import resolve_layout
from ringcore.testing import ACCEPTS, DISEASES, Dealt, Observation, diagnose, given_by, questions, right
from ringcore.testing.dense import lse_of, right_weights, softmax
from ringcore.testing.diagnosis import GROWING, NAMES, UNKNOWN, growing
from ringcore.testing.report import GLOBAL, HARD_CODED, ODD
from ringcore.testing.wrong_weights import averaged, hops, summed, triangle_in_each_hop

IN_BACKWARD = "stale", "lse of a hop", "out of a hop", "lse and out", "no delta", "no gradient", "dk and dv"

QUESTIONS = list(questions(ACCEPTS))
LENGTH = QUESTIONS[0].problem.positions
NARROW, EXACT = 2e-5, 1e-9  # what audits take for rounding, in float32 and float64


def observed(answer_of, sizes=(2, 3, 4), names=NAMES, dtype="float32", layout=None):
    """What an implementation gives for all that audits ask: ``answer_of(problem, dealt)``, rounded to the dtype."""
    found = []
    for size in sizes:
        dealt = Dealt.contiguous(LENGTH, LENGTH, size)
        if layout is not None:
            dealt = Dealt.by(resolve_layout(layout, LENGTH, size))
        for question in QUESTIONS:
            answer = answer_of(question.problem, dealt)
            given = {name: getattr(answer, name) for name in names}
            with np.errstate(over="ignore"):  # sums that are not rescaled, or not divided
                rounded = {name: x.astype(dtype).astype(float) for name, x in given.items() if x is not None}
            found.append(Observation(question.problem, dealt, rounded, question.name))
    return found


@pytest.mark.parametrize("disease", DISEASES, ids=lambda disease: disease.name)
def test_every_disease_is_told_by_its_name_alone(disease):
    dtype, tolerance = ("float64", EXACT) if "an epsilon" in disease.name else ("float32", NARROW)
    found = diagnose(observed(lambda each, dealt: given_by(disease, each, dealt), dtype=dtype), tolerance)
    assert [each.disease.name for each in found] == [disease.name]
    assert found[0].error > tolerance
    assert set(found[0].sizes) <= {2, 3, 4}


# The traps that real implementations fell into, by the name that each is told by.
TRAPS = {
    "per-chunk softmax summed": "softmax per chunk, summed over chunks",
    "per-chunk averaged (lse of zeros)": "chunks weighed equally, as by an lse of zeros",
    "chunk output scaled by exp(-max) only": "sums scaled by exp(-maximum) alone when the maximum grows",
    "no rescale on a new maximum": "sums that are not rescaled when the maximum grows",
    "missing final division": "sums that are not divided at the end",
    "base-2 lse": "lse in base 2 taken for a natural one",
    "bf16 lse": "lse rounded to bfloat16",
    "+inf sentinel": "+inf as the lse of a chunk of which nothing is seen",
    "finite sentinel": "a finite sentinel for hidden keys",
    "-inf minus -inf": "NaN where one hop shows a row nothing",
    "overflow in log1p(exp)": "exp of the gap between two chunks overflows",
    "epsilon in a denominator": "an epsilon of 1e-08 in the denominator",
    "causal offset with the wrong sign": "causal offset of a hop with the wrong sign",
    "stripe diagonal off by one": "causal stripes off by one",
    "window passed unchanged to each hop": "the window passed unchanged to each hop",
    "scale dropped": "scale ignored, and its default taken",
    "mask swallowed": "mask ignored",
    "sink counted per hop": "sinks counted once for each hop",
    "replicated tokens counted per rank": "a prefix counted once for each rank",
    "document boundary ignored": "documents ignored",
    "length floored to a multiple of P": "length floored to a multiple of the ring",
    "stale K, V in backward": "stale k and v in backward: a rank's own",
    "local out in backward": "out of a hop in backward",
    "local lse in backward": "lse of a hop in backward",
    "dK, dV returned one rank off": "dk and dv one rank off: of the next",
    "gradient dtype hard-coded": HARD_CODED.name,
    "grouped heads in the wrong order": "grouped heads in the wrong order",
    "send buffer overwritten in flight": "a block overwritten by the next before it left",
    "odd ring size deadlocks": ODD.name,
    "global rank used for a group rank": GLOBAL.name,
}


def test_every_trap_has_a_name_of_its_own():
    """Those of processes and dtypes are planted where audits and check_attention are tested, all others here."""
    assert len(set(TRAPS.values())) == len(TRAPS) == 30
    told_elsewhere = {each.name for each in (HARD_CODED, ODD, GLOBAL)}
    assert set(TRAPS.values()) - told_elsewhere <= {disease.name for disease in DISEASES}


def test_right_attention_has_no_disease():
    assert diagnose(observed(lambda each, dealt: right(each), sizes=(1, 2, 3, 4, 8)), NARROW) == []


def test_what_is_like_no_disease_is_said_to_be_unknown():
    def answer(each, dealt):
        return type(right(each))(*(1.5 * getattr(right(each), name) for name in NAMES))

    (found,) = diagnose(observed(answer), NARROW)
    assert found.disease is UNKNOWN
    assert found.results == NAMES
    assert found.questions == tuple(question.name for question in QUESTIONS)
    assert str(found).endswith(f'where asked "plain", "{QUESTIONS[1].name}", "causal" and {len(QUESTIONS) - 3} more)')


def test_it_says_on_which_questions_what_is_unknown_shows():
    def answer(each, dealt):
        due = right(each)
        return replace(due, dq=due.dq + 1) if each.window or each.softcap else due

    (found,) = diagnose(observed(answer), NARROW)
    assert (found.disease, found.questions) == (UNKNOWN, ("window", "softcap"))
    assert str(found).endswith('where asked "window", "softcap")')


def turned(each):
    order = np.arange(each.q.shape[1]) % each.k.shape[1]
    return replace(each, k=each.k[:, order], v=each.v[:, order])


def per_hop(each, dealt):
    return each.showing(causal=triangle_in_each_hop(each, dealt)) if "causal" in each.shown else each


# Two mistakes at once: the weights that they give, of what problem, the names of those that are alone somewhere, and
# where both are made.
TWO = [
    (summed, lambda each, dealt: each.without("window"), {"softmax per chunk, summed over chunks"}, {"window"}),
    (averaged, lambda each, dealt: turned(each), {"softmax per chunk, averaged over chunks"}, {"grouped heads"}),
    (None, lambda each, dealt: turned(per_hop(each, dealt)), {"a causal triangle in each hop"}, {"grouped heads"}),
    (None, lambda each, dealt: replace(per_hop(each, dealt), scale=1.0), {"no scale at all"}, {"causal", "softcap"}),
]


@pytest.mark.parametrize(("weights", "changed", "names", "both"), TWO)
def test_of_two_mistakes_the_one_that_is_alone_somewhere_is_named(weights, changed, names, both):
    def answer(each, dealt):
        there, due = changed(each, dealt), right(each)
        found = right_weights(there) if weights is None else weights(there, dealt)
        return replace(due, out=found @ there.of_heads(there.v))

    *named, rest = diagnose(observed(answer, names=("out",)), NARROW)
    assert {each.disease.name for each in named} == names
    assert rest.disease is UNKNOWN
    assert both <= set(rest.questions)
    assert "plain" not in rest.questions


def test_on_a_ring_of_one_what_merges_hide_elsewhere_is_named():
    def answer(each, dealt):
        there = each.without("window")
        return replace(right(each), out=summed(there, dealt) @ there.of_heads(there.v))

    found = diagnose(observed(answer, (1, 2, 3), names=("out",)), NARROW)
    assert [(each.disease.name, each.sizes) for each in found[1:]] == [("window ignored", (1,)), (UNKNOWN.name, (2, 3))]
    assert found[0].disease.name == "softmax per chunk, summed over chunks"


def test_out_alone_tells_what_out_shows():
    for disease in DISEASES:
        if "an epsilon" in disease.name:
            continue
        seen = observed(lambda each, dealt, disease=disease: given_by(disease, each, dealt), sizes=(3,), names=("out",))
        found = diagnose(seen, NARROW)
        assert [each.disease for each in found] in ([disease], [])
        assert bool(found) == (disease.weights is not None or not disease.name.startswith(IN_BACKWARD)), disease.name


@pytest.mark.parametrize("words", ["stale k and v", "one rank off", "not carried home"])
def test_mistakes_between_ranks_are_none_on_a_ring_of_one(words):
    diseases = [disease for disease in DISEASES if words in disease.name]
    assert diseases
    for disease in diseases:
        seen = observed(lambda each, dealt, disease=disease: given_by(disease, each, dealt), (1,))
        assert diagnose(seen, NARROW) == []


def test_two_diseases_that_nothing_tells_apart_are_both_named():
    off = [disease for disease in DISEASES if "one rank off" in disease.name]
    found = diagnose(observed(lambda each, dealt: given_by(off[0], each, dealt), sizes=(2,)), NARROW)
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

    each = QUESTIONS[0].problem
    given = {"out": attention(each.q, each.k, each.v, each.scale)}
    (found,) = diagnose([Observation(each, Dealt.contiguous(LENGTH, LENGTH, size), given)])
    assert found.disease.name == "softmax per chunk, summed over chunks"
    assert found.sizes == (size,)
    ones = replace(each, v=np.ones_like(each.v))
    np.testing.assert_allclose(attention(ones.q, ones.k, ones.v, ones.scale), size)  # the sum of weights


def test_stripes_off_by_one_are_told_as_such_where_ranks_hold_stripes():
    """There they are the same as places in shards compared, and both are named."""
    disease = next(disease for disease in DISEASES if disease.name == "causal stripes off by one")
    found = diagnose(observed(lambda each, dealt: given_by(disease, each, dealt), layout="striped"), NARROW)
    assert [each.disease.name for each in found] == ["a causal triangle in each hop", "causal stripes off by one"]


def merged(each, dealt, partials, accumulator):
    """Attention hop by hop; partial results and their sum are kept in these types."""
    out = lse = None
    for scores in hops(each, dealt):
        part, own = (softmax(scores) @ each.of_heads(each.v)).astype(partials), lse_of(scores)
        if out is None:
            out, lse = part.astype(accumulator), own
            continue
        both = np.logaddexp(lse, own)
        old, new = (
            np.where(np.isneginf(x), 0.0, np.exp(np.maximum(x, -1e9) - np.maximum(both, -1e9))) for x in (lse, own)
        )
        out, lse = (old * out.astype(float) + new * part.astype(float)).astype(accumulator), both
    due = right(each)
    return type(due)(out.astype(float), due.dq, due.dk, due.dv)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision_that_falls_as_the_ring_grows_is_told(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    half, rings = [each for each in QUESTIONS if not each.problem.before and each.problem.sinks is None], (1, 2, 4, 8)

    def seen(partials, accumulator):
        dealt = [Dealt.contiguous(LENGTH, LENGTH, size) for size in rings]
        answers = [(each, one, merged(each.problem, one, partials, accumulator)) for one in dealt for each in half]
        return [
            Observation(
                each.problem, one,
                {name: getattr(answer, name).astype(dtype).astype(float) for name in NAMES}, each.name,
            )
            for each, one, answer in answers
        ]  # fmt: skip

    (found,) = growing(seen(dtype, dtype))
    assert found.disease is GROWING
    assert (found.results, found.sizes) == (("out",), rings)
    assert growing(seen(dtype, np.float32)) == []
    assert growing(seen(np.float32, np.float32)) == []
    assert growing([each for each in seen(dtype, dtype) if each.dealt.size < 4]) == []  # too few to say


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_ringcore_is_healthy(layout):
    def answer(each, dealt):
        keywords = {
            "scale": each.scale,
            "softcap": each.softcap,
            "sinks": each.sinks,
            "bias": sum(each.added.values(), np.zeros((1, 1, LENGTH, LENGTH))),
            "ring_size": dealt.size,
            "layout": layout,
        }
        own_k, own_v = (x[:, :, each.before :] for x in (each.k, each.v))
        if each.before:
            keywords["prefix"] = each.k[:, :, : each.before], each.v[:, :, : each.before]
        mask = each.sees[..., each.before :]
        (out, _), pullback = ringcore.ring_attention_vjp(each.q, own_k, own_v, mask=mask, **keywords)
        return type(right(each))(out, *pullback(each.dout))

    assert diagnose(observed(answer, dtype="float64"), EXACT) == []
