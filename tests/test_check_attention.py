"""`ringcore.testing.check_attention`: right implementations pass, each wrong one is told what it does wrong."""

import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from given import torch

import ringcore
from ringcore.testing import ACCEPTS, Case, ask, cases, check_attention, questions
from ringcore.testing.asking import needs
from ringcore.testing.auditing import _collected
from ringcore.testing.libraries import library_of
from ringcore.testing.report import HANG, Fault, report_of
from ringcore.testing.running import Spec
from ringcore.testing.signatures import attention_of, signature_of

ALL = tuple(name for name in ACCEPTS if name != "dilated")


def chunked(q, k, v, *, ring_size, causal=False, scale=None, share=lambda total, size: total):
    """Each chunk of keys by its own softmax, added up."""
    length, group = k.shape[2], q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("bhid,bhjd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        scores = np.where(np.tri(q.shape[2], length, dtype=bool), scores, -np.inf)
    out = np.zeros_like(q)
    for columns in np.array_split(np.arange(length), ring_size):
        top = scores[..., columns].max(-1, keepdims=True)
        weights = np.exp(scores[..., columns] - np.where(np.isneginf(top), 0.0, top))
        total = weights.sum(-1, keepdims=True)
        out += weights / np.where(total > 0, total, 1) @ v[:, :, columns]
    return share(out, ring_size).astype(q.dtype)


def words_about(attention, **keywords):
    with pytest.raises(AssertionError) as caught:
        check_attention(attention, **keywords)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_ringcore_passes_on_numpy(dtype):
    report = check_attention(ringcore.ring_attention, accepts=ALL, dtype=dtype)
    assert report.right
    assert report.asked == 19 * 4
    assert str(report).startswith("right in all 76 answers")


def test_ringcore_passes_on_torch_with_gradients():
    torch()
    report = check_attention(ringcore.ring_attention, accepts=ALL, library="torch")
    assert {name for _, _, name in report.errors} == {"out", "dq", "dk", "dv"}


def test_no_gpu_is_named_where_arrays_are_on_none():
    assert library_of("numpy", "float32").gpu() is None
    torch()
    assert library_of("torch", "float32", "cpu").gpu() is library_of("torch", "float32").gpu() is None


def test_chunks_softmaxed_by_themselves_are_told():
    words = words_about(chunked)
    assert words.startswith("softmax per chunk, summed over chunks: the weights of a row sum to the number of chunks")
    assert "on rings of 2, 3, 4" in words
    assert "the weights of a row sum to 2 to 2 on a ring of 2, 3 to 3 on a ring of 3, 4 to 4 on a ring of 4" in words
    assert words_about(lambda *x, **k: chunked(*x, share=lambda total, size: total / size, **k)).startswith(
        "softmax per chunk, averaged over chunks"
    )


@pytest.mark.parametrize(
    ("swallowed", "due"),
    [
        *((name, f"{name} ignored") for name in ALL if name not in ("causal", "grouped", "scale", "prefix")),
        ("causal", "causal ignored"),
        ("scale", "scale ignored, and its default taken"),
        ("prefix", "prefix ignored"),
        ("dilated", "dilated ignored"),
    ],
)
@pytest.mark.parametrize("others", [("causal",), ()], ids=["causal", "alone"])
def test_a_keyword_that_is_taken_and_ignored_is_told(swallowed, due, others):
    def attention(q, k, v, **keywords):
        return ringcore.ring_attention(
            q, k, v, **{name: x for name, x in keywords.items() if swallowed not in needs({name: x})}
        )

    accepts = {swallowed, *others}
    assert [each.disease.name for each in ask(attention, accepts=accepts).diagnoses] == [due]


@pytest.mark.parametrize("word", ACCEPTS)
def test_every_keyword_is_asked_of_what_takes_no_other(word):
    asked = list(questions((word,)))
    assert {name for each in asked for name in needs(each.keywords)} <= {word}
    assert any(word in needs(each.keywords) or (word == "grouped" and each.problem.group > 1) for each in asked)
    assert len({each.name for each in asked}) == len(asked)


def test_a_keyword_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="accepts holds 'windows'; it must hold some of causal"):
        ask(ringcore.ring_attention, accepts=("causal", "windows"))


def test_a_mistake_that_is_differentiated_has_its_name_too():
    """The gradients are those of what it computes, and not those of any mistake in backward."""
    t = torch()

    def summed(q, k, v, *, ring_size):
        group = q.shape[1] // k.shape[1]
        chunks = (t.tensor_split(x.repeat_interleave(group, 1), ring_size, dim=2) for x in (k, v))
        found = (t.softmax(q @ a.mT * q.shape[3] ** -0.5, -1) @ b for a, b in zip(*chunks, strict=True))
        return sum(found)

    found = ask(summed, accepts=("grouped",), library="torch", ring_sizes=(2, 3, 4, 8))
    assert [each.disease.name for each in found.diagnoses] == ["softmax per chunk, summed over chunks"]
    assert found.diagnoses[0].results == ("out", "dq", "dk", "dv")


def test_jax_right_and_wrong_with_gradients():
    jax = pytest.importorskip("jax")
    xp = jax.numpy

    def summed(q, k, v, *, ring_size):
        found = 0
        for a, b in zip(xp.array_split(k, ring_size, 2), xp.array_split(v, ring_size, 2), strict=True):
            scores = xp.einsum("bhid,bhjd->bhij", q, a) * q.shape[3] ** -0.5
            found = found + jax.nn.softmax(scores, -1) @ b
        return found

    accepts = "causal", "mask", "bias", "sinks"  # whole arrays beside those that JAX traces
    report = check_attention(ringcore.ring_attention, library="jax", accepts=accepts, ring_sizes=(2,))
    assert {name for _, _, name in report.errors} == {"out", "dq", "dk", "dv"}
    found = ask(summed, accepts=(), library="jax", ring_sizes=(2, 3, 4, 8))
    assert [each.disease.name for each in found.diagnoses] == ["softmax per chunk, summed over chunks"]


def test_jax_dot_product_attention_by_its_signature():
    jax = pytest.importorskip("jax")
    attention, accepts, library, _ = attention_of(jax.nn.dot_product_attention, signature_of("jax"))
    assert (set(accepts), library) == ({"causal", "grouped", "window", "scale", "mask", "bias"}, "jax")
    found = ask(attention, accepts=accepts, library=library, ring_sizes=(1,))
    assert [each.disease.name for each in found.diagnoses] == ["a finite sentinel for hidden keys"]
    assert not found.faults


def test_nan_where_nothing_is_seen_is_told_on_torch_with_gradients():
    t = torch()

    def naive(q, k, v, *, ring_size, mask=None, causal=False, chunks=None):
        scores = q @ k.mT * q.shape[3] ** -0.5
        hidden = t.zeros(q.shape[2], k.shape[2], dtype=bool) if mask is None else ~mask
        hidden = hidden | t.ones_like(hidden).triu(1) if causal else hidden
        parts = zip(
            *(x.tensor_split(chunks or ring_size, dim) for x, dim in ((scores, 3), (hidden, 1), (v, 2))), strict=True
        )
        found = []
        for part, unseen, values in parts:
            part = part.masked_fill(unseen, float("-inf"))
            found.append((part.softmax(-1) @ values, part.logsumexp(-1, keepdim=True)))
        shares = t.stack([lse for _, lse in found]).softmax(0)
        return (shares * t.stack([out for out, _ in found])).sum(0)

    told = ask(partial(naive, chunks=1), accepts=("mask", "causal"), library="torch", ring_sizes=(1, 2))
    assert [each.disease.name for each in told.diagnoses] == ["NaN in rows that see nothing"]
    assert (told.diagnoses[0].sizes, told.diagnoses[0].results) == ((1, 2), ("out", "dv"))
    told = ask(naive, accepts=("mask", "causal"), library="torch", ring_sizes=(1, 2, 3))
    assert [each.disease.name for each in told.diagnoses] == ["NaN where one hop shows a row nothing"]


def test_gradients_of_the_wrong_ranks_keys_are_told():
    t = torch()

    class Shifted(t.autograd.Function):
        @staticmethod
        def forward(ctx, x, size):
            ctx.size = size
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            parts = t.tensor_split(gradient, ctx.size, dim=2)
            lengths = [part.shape[2] for part in parts]
            turned = [*parts[1:], parts[0]]
            found = [t.zeros_like(part) for part in parts]
            for mine, theirs, length in zip(found, turned, lengths, strict=True):
                count = min(length, theirs.shape[2])
                mine[:, :, :count] = theirs[:, :, :count]
            return t.cat(found, dim=2), None

    def attention(q, k, v, *, ring_size, **keywords):
        return ringcore.ring_attention(q, Shifted.apply(k, ring_size), Shifted.apply(v, ring_size), **keywords)

    found = ask(attention, library="torch", ring_sizes=(1, 3, 4))
    assert [each.disease.name for each in found.diagnoses] == ["dk and dv one rank off: of the next"]
    assert found.diagnoses[0].results == ("dk", "dv")


def ring_by_lse(t, turned=0):
    """A ring as most are: forward merges by logaddexp, backward takes exp(s - lse); dk and dv of so many ranks on."""

    class Ring(t.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, size):
            found = []
            for rows in q.tensor_split(size, 2):
                out, lse = t.zeros_like(rows), t.full_like(rows[..., :1], -t.inf)
                for keys, values in zip(k.tensor_split(size, 2), v.tensor_split(size, 2), strict=True):
                    scores = rows @ keys.mT * q.shape[3] ** -0.5
                    own = scores.logsumexp(-1, keepdim=True)
                    both = t.logaddexp(lse, own)
                    out = out * (lse - both).exp() + (scores - own).exp() @ values * (own - both).exp()
                    lse = both
                found.append((out, lse))
            out, lse = (t.cat(each, 2) for each in zip(*found, strict=True))
            ctx.size = size
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):
            q, k, v, out, lse = ctx.saved_tensors
            scale, delta = q.shape[3] ** -0.5, (dout * out).sum(-1, keepdim=True)
            weights = (q @ k.mT * scale - lse).exp()
            dscores = weights * (dout @ v.mT - delta) * scale
            dk, dv = (turn(x, ctx.size) for x in (dscores.mT @ q, weights.mT @ dout))
            return dscores @ k, dk, dv, None

    def turn(x, size):
        parts = x.tensor_split(size, 2)
        found = [t.zeros_like(part) for part in parts]
        for mine, theirs in zip(found, [parts[(rank + turned) % size] for rank in range(size)], strict=True):
            count = min(mine.shape[2], theirs.shape[2])
            mine[:, :, :count] = theirs[:, :, :count]
        return t.cat(found, 2)

    return lambda q, k, v, *, ring_size: Ring.apply(q, k, v, ring_size)


@pytest.mark.parametrize("length", [22, 48])
def test_a_ring_whose_backward_takes_exp_of_scores_minus_lse_is_right(length):
    """Where scores are large its dk is what is left of numbers that are a thousand times as large."""
    keywords = {"accepts": (), "library": "torch", "ring_sizes": (2, 3, 4), "length": length}
    assert check_attention(ring_by_lse(torch()), **keywords).right
    for turned, words in ((1, "of the next"), (-1, "of the one before")):
        found = ask(ring_by_lse(torch(), turned), **keywords)
        assert [each.disease.name for each in found.diagnoses] == [f"dk and dv one rank off: {words}"]


@pytest.mark.parametrize("skips", [True, False])
def test_a_sink_in_each_hop_is_told_whether_or_not_hidden_hops_are_passed_by(skips):
    def attention(q, k, v, *, ring_size, causal=False, sinks=None):
        places = np.array_split(np.arange(q.shape[2]), ring_size)
        sinks = np.full(q.shape[1], -np.inf) if sinks is None else sinks
        found = []
        for rank, mine in enumerate(places):
            total, out = 0.0, 0.0
            for hop in range(ring_size):
                theirs = places[rank - hop]
                if causal and skips and theirs[0] > mine[-1]:
                    continue
                scores = q[:, :, mine].astype(float) @ k[:, :, theirs].swapaxes(2, 3) * q.shape[3] ** -0.5
                power = np.exp(scores) * (~np.bool_(causal) | (theirs <= mine[:, None]))
                total = total + power.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
                out = out + power @ v[:, :, theirs]
            found.append(out / total)
        return np.concatenate(found, 2).astype(q.dtype)

    def of_small_scores(q, *x, **keywords):  # exp of others would need a maximum
        return (attention if np.abs(q).max() < 10 else right_one)(q, *x, **keywords)

    def right_one(q, k, v, *, ring_size, causal=False, sinks=None):
        return ringcore.ring_attention(q, k, v, ring_size=ring_size, causal=causal, sinks=sinks)

    found = ask(of_small_scores, accepts=("causal", "sinks"), ring_sizes=(1, 2, 3, 4))
    due = "sinks counted once for each hop" + " that shows a row something" * skips
    assert [(each.disease.name, each.sizes, each.questions) for each in found.diagnoses] == [
        (due, (2, 3, 4), ("sinks",))
    ]


def test_what_is_wrong_beside_the_numbers_is_told():
    calls = []

    def restless(q, k, v, *, ring_size, **keywords):
        calls.append(ring_size)
        if ring_size == 2:
            raise ZeroDivisionError("two ranks")
        out = ringcore.ring_attention(q, k, v, ring_size=ring_size, **keywords)
        if ring_size == 3:
            q += 1
        if ring_size == 4:
            return out.astype("float64")
        return out + np.float32(1e-7 * len(calls))

    found = ask(restless, accepts=())
    words = [(each.size, each.words) for each in found.faults]
    assert (2, "raised ZeroDivisionError: two ranks") in words
    assert (3, "q was written to") in words
    assert (4, "out is float64, the arrays given were float32") in words
    assert not found.diagnoses
    assert (1, "the same call gave other numbers the second time") in words
    assert not found.right


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("given", [None, 1.5, [], [[1.5]]], ids=repr)
def test_what_is_no_array_is_told(given, library):
    if library == "torch":
        torch()
    found = ask(lambda q, k, v, **keywords: given, accepts=(), library=library, ring_sizes=(2,))
    name = {"NoneType": "NoneType", "float": "float"}.get(type(given).__name__, "list")
    assert {each.words for each in found.faults} == {f"gave a {name}, not an array"}
    assert found.asked == len(found.faults) == 7
    assert not found.diagnoses


@pytest.mark.parametrize("signature", ["ringcore", "flash-attn"])
def test_arrays_of_another_library_and_none_are_told_by_every_signature(signature):
    torch()
    for given, name in ((np.zeros((1, 2, 22, 8), "float32"), "ndarray"), (None, "NoneType")):
        attention = attention_of(lambda q, k, v, given=given: given, signature_of(signature)).attention
        found = ask(attention, accepts=(), library="torch", ring_sizes=(1,))
        assert {each.words for each in found.faults} == {f"gave a {name}, not an array"}


def test_a_list_that_begins_with_out_is_taken_for_a_tuple():
    def attention(q, k, v, *, ring_size):
        return list(ringcore.ring_attention(q, k, v, ring_size=ring_size, return_lse=True))

    assert check_attention(attention, accepts=(), ring_sizes=(2,)).right


def test_odd_rings_are_not_told_by_the_ring_of_one():
    case = cases(accepts=(), ring_sizes=(2,))[0]
    answered = case.observe(lambda q, k, v, **keywords: ringcore.ring_attention(q, k, v), False, [])
    for hung, due in (((1,), []), ((1, 3), ["odd rings wait for ever"])):
        faults = [Fault("plain", size, "no answer", HANG, True) for size in hung]
        assert [each.disease.name for each in report_of([answered], faults, "float32").diagnoses] == due


def test_no_gpu_is_said_by_libraries_that_see_none(monkeypatch):
    t = torch()
    monkeypatch.setattr(t.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="device is 'cuda', but torch sees no GPU here"):
        library_of("torch", "float32", "cuda").settle(0)

    class NoDriver(RuntimeError):
        pass

    def count():
        raise NoDriver

    runtime = SimpleNamespace(CUDARuntimeError=NoDriver, getDeviceCount=count)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=None)))
    with pytest.raises(RuntimeError, match="device is 'cuda', but cupy sees no GPU here"):
        library_of("cupy", "float32").settle(0)


def test_a_library_that_is_not_known():
    with pytest.raises(ValueError, match="library is 'fortran'; it must be one of numpy, torch, jax"):
        ask(ringcore.ring_attention, library="fortran")


@pytest.mark.parametrize("case", cases(accepts=("causal", "window"), ring_sizes=(1, 3)), ids=str)
def test_cases_for_tests_of_ones_own(case):
    case.check(ringcore.ring_attention)
    with pytest.raises(AssertionError):
        case.check(lambda q, k, v, **keywords: 2 * q)


def test_gradients_of_a_hard_coded_dtype_are_told():
    """Torch casts those of its own; of others, JAX's among them, they come as they were made."""
    torch()

    def attention(q, k, v, *, ring_size):
        return ringcore.ring_attention(q, k, v, ring_size=ring_size)

    library = library_of("torch", "float64")
    given = library.call
    library.call = lambda *x, **y: {
        name: each.float() if name != "out" else each for name, each in given(*x, **y).items()
    }
    faults = []
    one = Case(cases(accepts=(), ring_sizes=(2,), library="torch", dtype="float64")[0].question, 2, library)
    report = report_of([one.observe(attention, True, faults)], faults, "float64")
    assert [each.disease.name for each in report.diagnoses] == ["the dtype of gradients is hard-coded"]
    assert report.diagnoses[0].results == ("dk", "dq", "dv")


def test_a_question_that_a_rank_left_without_a_word_is_a_fault(tmp_path):
    question = next(questions())
    (tmp_path / "0.0.json").write_text("[]")
    np.savez(tmp_path / "0.0.npz", out=question.problem.q[:, :, :11])
    spec = Spec("nobody:knows", ring_sizes=(2,), launcher="mpiexec")
    observed, (fault,) = _collected(spec, tmp_path, [(question, 2)], {}, [])
    assert observed == []
    assert (fault.question, fault.size, fault.words, fault.unanswered) == ("plain", 2, "no answer of rank 1", True)
