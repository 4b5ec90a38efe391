"""Half types through the ring: kept in float32 up to one rounding at the end, and given back as they came."""

import numpy as np
import pytest

import ringcore

ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def dense(q, k, v, dout):
    """out, lse, dq, dk, dv in float64, of inputs as they are after rounding."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bhsd,bhtd->bhst", q, k) * scale
    lse = np.log(np.exp(scores).sum(-1))
    weights = np.exp(scores - lse[..., None])
    slopes = np.einsum("bhse,bhte->bhst", dout, v)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    dq, dk = np.einsum("bhst,bhtd->bhsd", slopes, k), np.einsum("bhst,bhsd->bhtd", slopes, q)
    return weights @ v, lse, dq, dk, np.einsum("bhst,bhse->bhte", weights, dout)


def given(dtype, length=64, width=8, mean=0.0):
    rng = np.random.default_rng(9)
    arrays = [rng.standard_normal((1, 2, length, width)) for _ in range(4)]
    arrays[1] += mean
    return [x.astype(DTYPES[dtype]) for x in arrays]


def computed(q, k, v, dout, **keywords):
    (out, lse), pullback = ringcore.ring_attention_vjp(q, k, v, **keywords)
    return (out, lse, *pullback(dout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["numpy", "reference"])
@pytest.mark.parametrize("size", [1, 8])
def test_results_are_rounded_once(dtype, kernels, size):
    arrays = given(dtype)
    results = computed(*arrays, ring_size=size, kernels=kernels)
    due = dense(*arrays)
    for name, came, truth in zip(("out", "lse", "dq", "dk", "dv"), results, due, strict=True):
        assert came.dtype == (np.float32 if name == "lse" else DTYPES[dtype]), name
        # Half a unit in the last place of each number, and the float32 sums below it.
        unit = np.finfo(np.float32).eps if name == "lse" else float(ml_dtypes.finfo(DTYPES[dtype]).eps)
        allowed = 0.501 * unit * np.abs(truth) + 2e-6
        assert (np.abs(came.astype(np.float64) - truth) <= allowed).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["numpy", "reference"])
def test_delta_is_of_the_out_before_it_is_rounded(dtype, kernels):
    arrays = given(dtype, mean=64.0)  # the gradients of a row's scores sum to 0: what is left of them meets k
    dq, due = computed(*arrays, ring_size=2, kernels=kernels)[2], dense(*arrays)[2]
    assert np.abs(dq.astype(np.float64) - due).max() < 0.02 * np.abs(due).max()
