"""Tasks that add to the same rows: the order of the blocks of keys decides the bits, not who is first.

At least three blocks, for two numbers have the same sum in either order.
"""

import time

import numpy as np
import pytest

import ringcore
from ringcore_numpy import NumpyKernels, backward

KEYS = 32
LENGTH = 4 * KEYS
BATCH, HEADS = 2, 8  # fewer blocks at once than threads, so that the late one is overtaken


@pytest.fixture(autouse=True)
def late_first_block(monkeypatch):
    """Small blocks, the first of which comes last."""
    genuine = backward.Backward._prepare_keys

    def prepare_keys(self, task, span, scratch):
        if span[0] == 0:
            time.sleep(0.02)
        return genuine(self, task, span, scratch)

    monkeypatch.setattr(backward, "_KEYS", KEYS)
    monkeypatch.setattr(backward, "_LARGE", KEYS)
    monkeypatch.setattr(backward.Backward, "_prepare_keys", prepare_keys)


def gradients(threads, bias_shape):
    rng = np.random.default_rng(2)
    shapes = [(BATCH, heads, LENGTH, 8) for heads in (HEADS, 1, 1, HEADS)]
    q, k, v, dout = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    bias = None if bias_shape is None else rng.standard_normal(bias_shape).astype(np.float32)
    wrt = ("q", "k", "v") if bias is None else ("k", "v", "bias")  # tasks that wait for dq are in order already
    _, pullback = ringcore.ring_attention_vjp(q, k, v, wrt=wrt, bias=bias, kernels=NumpyKernels(threads))
    return dict(zip(wrt, pullback(dout), strict=True))


@pytest.mark.parametrize("bias_shape", [None, (BATCH, HEADS, LENGTH, 1), (BATCH, HEADS, 1, 1)])
def test_sums_over_many_blocks_do_not_depend_on_which_is_first(bias_shape):
    alone, together = gradients(1, bias_shape), gradients(4, bias_shape)
    for name, x in together.items():
        np.testing.assert_array_equal(x, alone[name], err_msg=f"d{name}")
