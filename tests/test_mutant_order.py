"""Tasks that add to the same rows: the order of the blocks of keys decides the bits, not who is first.

At least three blocks, for two numbers have the same sum in either order.
"""

import threading

import numpy as np
import pytest

import ringcore
from ringcore_numpy import NumpyKernels, backward

KEYS, BLOCKS = 32, 4
BATCH, HEADS = 2, 8
TASKS = range(BATCH * BLOCKS)
FIRST, NEXT, LATER = TASKS[:BATCH], TASKS[BATCH : 2 * BATCH], TASKS[BATCH:]  # those of the first block, and so on
THREADS = 2 * BATCH


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """As many tasks as there are blocks and batch entries."""
    monkeypatch.setattr(backward, "_KEYS", KEYS)
    monkeypatch.setattr(backward, "_LARGE", KEYS)


@pytest.fixture
def late(monkeypatch):
    """The first block goes on once the next one's tasks wait for it, or all others are done, as they should not be."""
    moved, waiting, done = threading.Condition(), set(), set()
    prepare, wait, passed = backward.Backward._prepare_keys, backward.Order.wait, backward.Order.passed

    def noted(names, task):
        with moved:
            names.add(task)
            moved.notify_all()

    def prepare_keys(self, task, span, scratch):
        if span[0] == 0:
            with moved:
                assert moved.wait_for(lambda: waiting >= {*NEXT} or done >= {*LATER}, timeout=60)
        return prepare(self, task, span, scratch)

    def waits(self, task, *given, **keywords):
        if task in NEXT:
            noted(waiting, task)
        wait(self, task, *given, **keywords)

    def passes(self, task, position):
        passed(self, task, position)
        if position == backward.EVERYTHING:
            noted(done, task)

    monkeypatch.setattr(backward.Backward, "_prepare_keys", prepare_keys)
    monkeypatch.setattr(backward.Order, "wait", waits)
    monkeypatch.setattr(backward.Order, "passed", passes)


def gradients(threads, bias_shape):
    rng = np.random.default_rng(2)
    shapes = [(BATCH, heads, KEYS * BLOCKS, 8) for heads in (HEADS, 1, 1, HEADS)]
    q, k, v, dout = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    bias = None if bias_shape is None else rng.standard_normal(bias_shape).astype(np.float32)
    wrt = ("q", "k", "v") if bias is None else ("k", "v", "bias")  # tasks that wait for dq are in order already
    _, pullback = ringcore.ring_attention_vjp(q, k, v, wrt=wrt, bias=bias, kernels=NumpyKernels(threads))
    return dict(zip(wrt, pullback(dout), strict=True))


BIASES = [None, (BATCH, HEADS, KEYS * BLOCKS, 1), (BATCH, HEADS, 1, 1)]


@pytest.fixture(params=BIASES, ids=["none", "of rows", "of heads"])
def alone(request):
    return request.param, gradients(1, request.param)


def test_sums_over_many_blocks_do_not_depend_on_which_is_first(alone, late):
    bias_shape, due = alone
    for name, x in gradients(THREADS, bias_shape).items():
        np.testing.assert_array_equal(x, due[name], err_msg=f"d{name}")
