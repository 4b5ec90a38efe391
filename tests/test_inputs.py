"""What a call takes: values in every form that says the same, nothing to attend, and inputs that it never writes to."""

import numpy as np
import pytest
from given import GIVEN, K, Q, V, arrays, strict, torch

import ringcore
from ringcore import ring_attention, ring_attention_vjp

# A form, and the plain way to say it.
FORMS = {
    "window of NumPy integers": ({"window": (np.int64(2), np.int32(1))}, {"window": (2, 1)}),
    "window list": ({"window": [2, 1]}, {"window": (2, 1)}),
    "scale scalar": ({"scale": np.float32(0.5)}, {"scale": 0.5}),
    "scale array of no axes": ({"scale": np.array(0.5)}, {"scale": 0.5}),
    "scale whole": ({"scale": 2}, {"scale": 2.0}),
    "negative scale": ({"scale": -0.5}, {"scale": -0.5}),
    "causal scalar": ({"causal": np.True_}, {"causal": True}),
    "ring size scalar": ({"ring_size": np.int64(2)}, {"ring_size": 2}),
    "key lengths array": ({"key_lengths": np.array([5, 3])}, {"key_lengths": (5, 3)}),
    "key lengths range": ({"key_lengths": range(4, 6)}, {"key_lengths": (4, 5)}),
    "offset scalar": ({"query_offset": np.int64(1), "causal": True}, {"query_offset": [1, 1], "causal": True}),
    "offsets array": ({"query_offset": np.array([1, -1]), "causal": True}, {"query_offset": (1, -1), "causal": True}),
    "offset beyond all": ({"query_offset": 10**20, "causal": True}, {}),
}


@pytest.mark.parametrize(("form", "plain"), FORMS.values(), ids=FORMS)
def test_values_are_taken_in_every_form_that_says_the_same(form, plain):
    np.testing.assert_array_equal(ring_attention(Q, K, V, **form), ring_attention(Q, K, V, **plain))


@pytest.mark.parametrize("library", [torch, strict])
def test_key_lengths_may_be_an_array_of_any_library(library):
    due = ring_attention(Q, K, V, key_lengths=[5, 3])
    came = ring_attention(Q, K, V, key_lengths=library().asarray([5, 3]))
    np.testing.assert_array_equal(came, due)


@pytest.mark.parametrize("kernels", ["numpy", "reference"])
def test_wider_bias_than_the_scores_hides_no_key_by_rounding(kernels):
    """The most negative float64 is finite: a row of nothing else is the mean of v, not empty."""
    q, k, v = (x.astype("float32") for x in (Q, K, V))
    bias = np.full((6, 6), np.finfo("float64").min)
    bias[:, 5] = -np.inf
    (out, lse), pullback = ring_attention_vjp(q, k, v, bias=bias, ring_size=2, kernels=kernels, wrt=("bias",))
    mean = np.repeat(v[:, :, :5].mean(axis=2, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=0, atol=1e-6)
    assert np.isfinite(lse).all()
    (dbias,) = pullback(GIVEN["dout"].astype("float32"))
    assert dbias.dtype == np.float64
    assert (dbias[:, 5] == 0).all()
    assert (dbias[:, :5] != 0).any()


@pytest.mark.parametrize("kernels", ["numpy", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("empty", ["queries", "keys", "batch", "queries and keys"])
def test_nothing_to_attend_gives_empty_results_or_zeros(empty, size, layout, kernels):
    given = arrays(**dict.fromkeys(empty.split(" and "), 0))
    bias = np.zeros((given["q"].shape[0] or 1, 1, given["q"].shape[2], given["k"].shape[2]))
    (out, lse), pullback = ring_attention_vjp(
        given["q"], given["k"], given["v"], bias=bias, wrt=("q", "k", "v", "bias"),
        ring_size=size, layout=layout, kernels=kernels, causal=True, key_lengths=[0] * len(given["q"]),
    )  # fmt: skip
    assert out.shape == given["dout"].shape
    assert lse.shape == given["dlse"].shape
    assert (out == 0).all()
    assert (lse == -np.inf).all()
    for x, like in zip(pullback(given["dout"], given["dlse"]), (*[given[n] for n in "qkv"], bias), strict=True):
        assert x.shape == like.shape
        assert (x == 0).all()


@pytest.mark.parametrize("size", [2, 7, 40])
def test_rings_of_more_ranks_than_positions_work(size):
    np.testing.assert_allclose(ring_attention(Q, K, V, ring_size=size), ring_attention(Q, K, V), rtol=0, atol=1e-14)


def test_layout_with_ranks_that_hold_nothing_works():
    layout = ringcore.Layout(((), (range(0, 6),), (range(3, 3),)))
    np.testing.assert_array_equal(ring_attention(Q, K, V, ring_size=3, layout=layout), ring_attention(Q, K, V))


KEPT = {
    "plain": {},
    "causal zigzag": {"causal": True, "layout": "zigzag"},
    "everything": {"causal": True, "window": 4, "softcap": 2.0, "key_lengths": [5, 6], "scale": 0.7},
}


@pytest.mark.parametrize("kernels", ["numpy", "reference"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("axes", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", KEPT)
def test_inputs_are_never_written_to(name, axes, dtype, size, kernels):
    given = arrays(dtype=dtype)
    given["dlse"] = given["dlse"].astype("float64" if dtype == "float64" else "float32")
    rng = np.random.default_rng(1)
    given["bias"] = rng.standard_normal((2, 4, 6, 6)).astype(dtype)
    given["mask"] = rng.random((2, 4, 6, 6)) < 0.8
    if axes == "bshd":
        given |= {each: given[each].swapaxes(1, 2).copy() for each in ("q", "k", "v", "dout")}
    kept = {each: x.copy() for each, x in given.items()}
    for x in given.values():
        x.flags.writeable = False  # a write would raise
    keywords = {**KEPT[name], "ring_size": size, "kernels": kernels, "axes": axes}
    inputs = {each: given[each] for each in ("q", "k", "v", "bias", "mask")}
    ring_attention(**inputs, **keywords)
    (out, lse), pullback = ring_attention_vjp(**inputs, wrt=("q", "k", "v", "bias"), **keywords)
    before = out.copy(), lse.copy()
    gradients = pullback(given["dout"], given["dlse"])
    for x, like in zip((out, lse), before, strict=True):
        np.testing.assert_array_equal(x, like)
    for each, x in given.items():
        np.testing.assert_array_equal(x, kept[each], err_msg=each)
    for result in (out, lse, *gradients):  # whoever writes to a result writes to no input
        assert not any(np.shares_memory(result, x) for x in given.values())


@pytest.mark.parametrize("size", [1, 3])
def test_tensors_are_never_written_to(size):
    given = {name: torch().asarray(x.copy()) for name, x in GIVEN.items()}
    given["bias"] = torch().zeros(6, 6, dtype=torch().float64)
    kept = {name: x.clone() for name, x in given.items()}
    (out, _), pullback = ring_attention_vjp(
        **{name: given[name] for name in ("q", "k", "v", "bias")}, wrt=("q", "k", "v", "bias"), ring_size=size
    )
    gradients = pullback(given["dout"], given["dlse"])
    for x in (out, *gradients):
        x.fill_(7)
    for name, x in given.items():
        assert (x == kept[name]).all(), name


def test_the_kind_of_a_device_is_a_bare_word():
    from ringcore.partial import device_kind

    class Array:
        def __init__(self, device):
            self.device = device

        def __array_namespace__(self, api_version=None):
            return ringcore

    for name, kind in {"cpu": "cpu", "cuda:1": "cuda", "<CUDA Device 0>": "cuda", "TFRT_CPU_0": "tfrt_cpu_0"}.items():
        assert device_kind(Array(name)) == kind
