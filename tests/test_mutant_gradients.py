"""Gradients of rings whose shards are of one length, so that a block taken for another's fits without a word."""

import numpy as np
import pytest

import ringcore

LENGTH = 12


def arrays():
    rng = np.random.default_rng(5)
    return [rng.standard_normal((1, 2, LENGTH, 3)) for _ in range(4)]


def dense(q, k, v, dout):
    """dq, dk, dv through one softmax over all keys."""
    weights = np.exp(np.einsum("bhsd,bhtd->bhst", q, k) / np.sqrt(3))
    weights /= weights.sum(-1, keepdims=True)
    slopes = np.einsum("bhse,bhte->bhst", dout, v)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) / np.sqrt(3)
    return {
        "q": np.einsum("bhst,bhtd->bhsd", slopes, k),
        "k": np.einsum("bhst,bhsd->bhtd", slopes, q),
        "v": np.einsum("bhst,bhse->bhte", weights, dout),
    }


def gradients(wrt, size, layout):
    q, k, v, dout = arrays()
    _, pullback = ringcore.ring_attention_vjp(q, k, v, wrt=wrt, ring_size=size, layout=layout)
    return dict(zip(wrt, pullback(dout), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_dk_and_dv_come_home_to_their_owner(size, layout):
    came, due = gradients(("k", "v"), size, layout), dense(*arrays())
    for name, x in came.items():
        np.testing.assert_allclose(x, due[name], rtol=0, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_dq_is_of_the_keys_that_visit(size):
    np.testing.assert_allclose(gradients(("q",), size, "contiguous")["q"], dense(*arrays())["q"], rtol=0, atol=1e-13)


def test_gradients_come_in_the_order_of_wrt():
    due = dense(*arrays())
    for wrt in (("v", "q"), ("k", "q", "v"), ("v", "k")):
        for name, x in gradients(wrt, 2, "contiguous").items():
            np.testing.assert_allclose(x, due[name], rtol=0, atol=1e-13, err_msg=f"d{name} of {wrt}")
