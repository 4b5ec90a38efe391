"""A NaN in a key that some rows may not see: it stays out of those, and shows in the others."""

import numpy as np
import pytest

import ringcore

LENGTH = 10
BAD = 6  # the poisoned position; under a causal band the rows from there on see it


def results(kernels, size, poisoned, value=np.nan):
    """out, dq, dk, dv of a causal call, with one row of an input poisoned."""
    rng = np.random.default_rng(3)
    given = {name: rng.standard_normal((1, 2, LENGTH, 4)) for name in ("q", "k", "v", "dout")}
    if poisoned is not None:
        given[poisoned][:, :, BAD] = value
    dout = given.pop("dout")
    (out, _), pullback = ringcore.ring_attention_vjp(**given, causal=True, ring_size=size, kernels=kernels)
    return dict(zip(("out", "q", "k", "v"), (out, *pullback(dout)), strict=True))


def same_but(came, clean, rows, words):
    np.testing.assert_allclose(came[:, :, rows], clean[:, :, rows], rtol=0, atol=1e-13, err_msg=words)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kernels", ["reference", "numpy"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poison_of_a_key_stays_hidden_from_earlier_rows(kernels, size, value):
    clean = results(kernels, size, None)
    for name in ("k", "v"):
        came = results(kernels, size, name, value)
        for of in ("out", "q"):
            same_but(came[of], clean[of], slice(0, BAD), f"{of} by {name}")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kernels", ["reference", "numpy"])
@pytest.mark.parametrize("name", ["q", "dout"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poison_of_a_row_stays_hidden_from_later_keys(kernels, name, value):
    clean, came = (results(kernels, 1, poisoned, value) for poisoned in (None, name))
    for of in ("k", "v"):
        same_but(came[of], clean[of], slice(BAD + 1, None), f"d{of} by {name}")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kernels", ["reference", "numpy"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_poison_of_a_visible_key_shows(kernels, size):
    for name in ("k", "v"):
        assert np.isnan(results(kernels, size, name)["out"][:, :, BAD:]).all()
    assert np.isinf(results(kernels, size, "v", np.inf)["out"][:, :, BAD:]).all()
