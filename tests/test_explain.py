"""What explain says: who computes, why each one before was passed over, and how blocks travel."""

import inspect
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from given import GIVEN, K, Q, V, refused

import ringcore
from ringcore import (
    Capabilities,
    DtypeError,
    Explanation,
    KeywordError,
    MissingDependency,
    ShapeError,
    UnsupportedError,
    discovery,
    explain,
)
from ringcore.tile import ReferenceKernels

HALF = frozenset({"float16"})
TORCH_PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "torch.md"


class Planted(ReferenceKernels):
    """The reference kernels with other capabilities."""

    def __init__(self, **capabilities):
        self._capabilities = Capabilities(**capabilities)

    @property
    def capabilities(self):
        return self._capabilities


def install(monkeypatch, **factories):
    """Install kernels beside those that are there, by name with "_" for "."; ``factories`` make them."""
    module = ModuleType("planted")
    points = dict(discovery._points("ringcore.kernels"))
    for attribute, factory in factories.items():
        setattr(module, attribute, factory)
        name = attribute.replace("_", ".")
        points[name] = EntryPoint(name, f"planted:{attribute}", "ringcore.kernels")
    monkeypatch.setitem(sys.modules, "planted", module)
    found = discovery._points
    monkeypatch.setattr(discovery, "_points", lambda group: points if group == "ringcore.kernels" else found(group))
    discovery._loaded.cache_clear()


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    discovery._loaded.cache_clear()


def reason(explanation, name):
    """Why the kernels of this name were passed over."""
    (found,) = (words for words in explanation.passed if words.startswith(f"{name}: "))
    return found.removeprefix(f"{name}: ")


def test_the_keywords_are_those_of_ring_attention_and_wrt():
    attention, explained = (inspect.signature(f).parameters for f in (ringcore.ring_attention, explain))
    assert {name: x for name, x in explained.items() if name != "wrt"} == dict(attention)


def test_numpy_arrays_are_computed_by_the_numpy_kernels():
    found = explain(Q, K, V, causal=True, ring_size=4, layout="zigzag")
    assert (found.kernels, found.layout) == ("numpy", "zigzag")
    assert found.ring == "local ring of 4 rank(s), all in this process"


def test_kernels_of_another_library_are_passed_over_for_it():
    assert reason(explain(Q, K, V), "torch.cpu") == "they take arrays of torch, not of numpy"


def test_kernels_of_another_device_are_passed_over_for_it(monkeypatch):
    install(monkeypatch, numpy_cuda=pytest.fail)
    assert reason(explain(Q, K, V), "numpy.cuda") == "they compute on cuda, not on cpu"


LACKS = {
    "library": ({"libraries": frozenset({"cupy"})}, {}, "they take arrays of cupy, not of numpy"),
    "device": ({"devices": frozenset({"cuda"})}, {}, "they compute on cuda, not on cpu"),
    "dtype": ({"dtypes": HALF}, {}, "they take float16, not float64"),
    "widest head": ({"largest_head": 2}, {}, "their widest head is 2, but this call has 4"),
    "multiple": (
        {"head_multiple": 4},
        {},
        "their heads have a multiple of 4 columns, but this call has 4 and 3",
    ),
    "equal widths": (
        {"equal_heads": True},
        {},
        "their k and v are equally wide, but this call has 4 and 3 columns",
    ),
    "bias": ({"bias": False}, {"bias": np.zeros((6, 6))}, "they have no bias"),
    "mask": ({"mask": False}, {"mask": np.ones((6, 6), bool)}, "they have no mask"),
    "softcap": ({"softcap": False}, {"softcap": 2.0}, "they have no softcap"),
    "window": ({"window": False}, {"window": (1, None)}, "they have no window"),
    "gradient": ({"gradient": False}, {"wrt": ("v",)}, "they have no gradient"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_kernels_are_passed_over_for_what_they_lack(monkeypatch, lack):
    lacks, call, words = LACKS[lack]
    install(monkeypatch, numpy_cpu_best=lambda sharers: Planted(name="best", preference=9, **lacks))
    found = explain(Q, K, V, **call)
    assert reason(found, "numpy.cpu.best") == words
    assert found.kernels == "numpy"
    install(monkeypatch, numpy_cpu_best=lambda sharers: Planted(name="best", preference=9))
    assert explain(Q, K, V, **call).kernels == "best"


@pytest.mark.parametrize("lack", LACKS)
def test_kernels_that_are_asked_for_are_refused_with_the_reason(lack):
    lacks, call, words = LACKS[lack]
    kernels = Planted(name="asked", **lacks)
    refused(lambda: explain(Q, K, V, kernels=kernels, **call), UnsupportedError, ["'asked'", words])


def test_kernels_that_fail_their_probation_are_passed_over_with_what_was_wrong(monkeypatch):
    class Wrong(Planted):
        def forward(self, q, k, v, **keywords):
            part = super().forward(q, k, v, **keywords)
            return ringcore.Partial(part.weighted, part.maximum + 1, part.total)

    install(monkeypatch, numpy_cpu_best=lambda sharers: Wrong(name="numpy.cpu.best", preference=9, fused=True))
    found = explain(Q, K, V)
    assert reason(found, "numpy.cpu.best").startswith("their results on a small tile are wrong (lse is off by ")
    assert found.kernels == "numpy"


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    def load(sharers):
        raise MissingDependency('ringcore_best needs best, which is not installed: pip install "ringcore[best]".')

    install(monkeypatch, numpy_cpu_best=load)
    assert 'pip install "ringcore[best]"' in reason(explain(Q, K, V), "numpy.cpu.best")


@pytest.mark.parametrize("fault", [RuntimeError, OSError, ImportError])
def test_kernels_whose_library_is_broken_are_passed_over(monkeypatch, tmp_path, fault):
    (tmp_path / "ringcore_broken.py").write_text(f"raise {fault.__name__}('no half of it for CUDA 13')")
    monkeypatch.syspath_prepend(tmp_path)
    install(monkeypatch)
    points = discovery._points("ringcore.kernels")
    points["numpy.cpu.best"] = EntryPoint("numpy.cpu.best", "ringcore_broken:load", "ringcore.kernels")
    found = explain(Q, K, V)
    assert found.kernels == "numpy"
    assert f"ringcore_broken cannot be imported, for what it needs fails: {fault.__name__}: no half of it" in reason(
        found, "numpy.cpu.best"
    )
    with pytest.raises(MissingDependency, match="no half of it for CUDA 13"):
        explain(Q, K, V, kernels="numpy.cpu.best")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("from ringcore import no_such_name", ImportError),
        ("import ringcore\nraise ringcore.UnsupportedError('not on this machine')", UnsupportedError),
        ("raise ZeroDivisionError", ZeroDivisionError),
    ],
)
def test_an_adapters_own_mistakes_are_not_taken_for_a_broken_library(monkeypatch, tmp_path, program, error):
    (tmp_path / "ringcore_mistaken.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("numpy.cpu.best", "ringcore_mistaken:load", "ringcore.kernels")
    with pytest.raises(error) as caught:
        discovery._load(point)
    assert not isinstance(caught.value, MissingDependency)


def test_of_several_kernels_that_can_the_preferred_ones_are_named(monkeypatch):
    install(
        monkeypatch,
        numpy_cpu_good=lambda sharers: Planted(name="good", preference=8),
        numpy_cpu_best=lambda sharers: Planted(name="best", preference=9),
    )
    assert explain(Q, K, V).kernels == "best"


def test_others_may_be_preferred_for_few_queries(monkeypatch):
    install(
        monkeypatch,
        numpy_cpu_few=lambda sharers: Planted(name="few", preference=8, preference_for_few=10),
        numpy_cpu_best=lambda sharers: Planted(name="best", preference=9),
    )
    assert explain(Q[:, :, :1], K, V).kernels == "few"
    assert explain(np.repeat(Q, 3, axis=2), K, V).kernels == "best"


def test_kernels_that_are_asked_for_are_named_and_none_is_passed_over():
    found = explain(Q, K, V, kernels="reference")
    assert (found.kernels, found.passed) == ("reference", ())


def test_a_layout_of_ones_own_is_named():
    assert explain(Q, K, V, layout=ringcore.striped(6, 2), ring_size=2).layout == "striped"


def test_what_terms_of_positions_cost_is_said():
    found = explain(Q, K, V, mask=lambda i, j: i >= j, alibi=np.zeros(Q.shape[1]))
    assert [cost.partition(":")[0] for cost in found.costs] == ["mask", "alibi"]
    assert str(found).splitlines()[-2:] == [f"costs    {found.costs[0]}", f"         {found.costs[1]}"]
    assert explain(Q, K, V).costs == ()


def test_the_layout_that_auto_takes_is_named():
    x = np.zeros((1, 1, 64, 2))
    assert explain(x, x, x, causal=True, layout="auto", ring_size=4).layout in ("zigzag", "balanced")
    assert explain(x, x, x, layout="auto", ring_size=4).layout == "contiguous"


def test_the_text_has_one_fact_a_line():
    found = Explanation("reference", ("torch.cpu: they have no bias", "best: too slow"), "local", "zigzag")
    assert str(found).splitlines() == [
        "kernels  reference",
        "         not torch.cpu: they have no bias",
        "         not best: too slow",
        "ring     local",
        "layout   zigzag",
    ]


def test_what_the_call_would_refuse_is_refused():
    refused(lambda: explain(Q[0], K, V), ShapeError, ["q has 3 axes"])
    refused(lambda: explain(Q.astype(int), K, V), DtypeError, ["q holds int64"])
    refused(lambda: explain(Q, K, V, wrt=("p",)), KeywordError, ["wrt is ('p',)"])
    refused(lambda: explain(Q, K, V, ring_size=0), KeywordError, ["ring_size is 0"])
    refused(lambda: explain(Q, K, V, return_lse=1), KeywordError, ["return_lse is 1"])


class SilentRing:
    """A ring of two ranks on which every communication is a failure."""

    rank, size, node, sharers = 0, 2, 0, 2

    def check(self, *arrays):
        pass

    def gather(self, note):
        pytest.fail("explain gathered")

    exchange = abort = gather


def test_a_ring_of_processes_is_described_in_its_own_words_and_nothing_is_sent():
    ring = SilentRing()
    assert explain(Q, K, V, ring=ring).ring == "SilentRing"
    ring.explain = "by pigeon"
    assert explain(Q, K, V, ring=ring).ring == "by pigeon"


def test_arrays_that_a_ring_cannot_carry_are_refused():
    class Narrow(SilentRing):
        def check(self, *arrays):
            raise UnsupportedError("no pigeon carries this")

    ring = Narrow()
    refused(lambda: explain(Q, K, V, ring=ring), UnsupportedError, ["no pigeon carries this"])
    ring.size = 1
    assert explain(Q, K, V, ring=ring).kernels == "numpy"


def test_inputs_are_left_as_they_are():
    before = {name: x.copy() for name, x in GIVEN.items()}
    explain(Q, K, V, causal=True, wrt=("q", "k", "v"))
    for name, x in GIVEN.items():
        np.testing.assert_array_equal(x, before[name])


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_torch_tensors_are_computed_by_the_fused_kernels_of_their_device(torch):
    found = explain(*(torch.from_numpy(x) for x in (Q, K, V)), causal=True)
    assert found.kernels == "torch.cpu"
    assert reason(found, "torch.cuda.flash2") == "they compute on cuda, not on cpu"
    assert reason(found, "numpy") == "they take arrays of numpy, not of torch"


@pytest.mark.parametrize("term", ["bias", "softcap"])
def test_what_torch_kernels_on_the_cpu_lack_takes_the_reference_kernels(torch, term):
    value = {"bias": torch.zeros(6, 6, dtype=torch.float64), "softcap": 2.0}[term]
    found = explain(*(torch.from_numpy(x) for x in (Q, K, V)), **{term: value})
    assert (found.kernels, reason(found, "torch.cpu")) == ("reference", f"they have no {term}")


@pytest.mark.parametrize("name", ["q", "v", "bias"])
def test_tensors_that_require_grad_count_as_wanted_gradients(torch, monkeypatch, name):
    install(monkeypatch, torch_cpu=lambda sharers: Planted(name="best", gradient=False))
    given = {**{name: torch.from_numpy(GIVEN[name]) for name in "qkv"}, "bias": torch.zeros(6, 6)}
    assert explain(**given).kernels == "best"
    given[name] = given[name].clone().requires_grad_()
    assert reason(explain(**given), "torch.cpu") == "they have no gradient"


def test_the_program_in_the_documentation_prints_what_stands_there(torch, capsys):
    program, shown = re.search(
        r"```python\n([^`]*explain[^`]*)```\n+```text\n(.*?)```", TORCH_PAGE.read_text(), re.DOTALL
    ).groups()
    exec(program, {})
    assert capsys.readouterr().out == shown
