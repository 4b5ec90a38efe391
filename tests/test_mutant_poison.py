"""A NaN or an infinity in a row of q or dout stays out of the gradients of keys that the row may not see."""

import numpy as np
import pytest

import ringcore

LENGTH = 10
BAD = 6  # the poisoned row; under a causal band the keys behind it are hidden from it


def gradients(kernels, size, poisoned=None, value=np.nan):
    """dk and dv of a causal call, with one row of an input poisoned."""
    rng = np.random.default_rng(3)
    given = {name: rng.standard_normal((1, 2, LENGTH, 4)) for name in ("q", "k", "v", "dout")}
    if poisoned is not None:
        given[poisoned][:, :, BAD] = value
    dout = given.pop("dout")
    _, pullback = ringcore.ring_attention_vjp(**given, wrt=("k", "v"), causal=True, ring_size=size, kernels=kernels)
    return dict(zip(("dk", "dv"), pullback(dout), strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kernels", ["numpy", "reference"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["q", "dout"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poison_of_a_row_stays_hidden_from_later_keys(kernels, size, name, value):
    clean, came = gradients(kernels, size), gradients(kernels, size, name, value)
    for of in ("dk", "dv"):
        assert np.isfinite(clean[of]).all()
        assert not np.isfinite(came[of][:, :, : BAD + 1]).any(), of
        np.testing.assert_allclose(came[of][:, :, BAD + 1 :], clean[of][:, :, BAD + 1 :], rtol=0, atol=1e-13)
