"""Sums of gradients: what fused kernels return is rounded no oftener than needed, and never summed in a half type."""

from types import SimpleNamespace

import numpy as np
import pytest

from ringcore import Capabilities, Score
from ringcore.backward_work import BackwardWork
from ringcore.forward_work import ForwardWork
from ringcore.sums import Sum
from ringcore.values import Move

ALL = slice(None), slice(None), slice(None), ...
ROWS = slice(None), slice(None), slice(2, 7), ...
DTYPE = np.float16


def draw(count):
    random = np.random.default_rng(11)
    return [random.standard_normal((1, 2, 9, 4)).astype(DTYPE) for _ in range(count)]


def test_one_part_is_taken_as_it_is():
    (like,) = draw(1)
    total = Sum(like)
    total.add(ALL, like)
    assert total.take() is like


def test_two_parts_are_rounded_once():
    first, second = draw(2)
    due = first.astype(np.float64)
    due[ROWS] += second[ROWS]
    total = Sum(first)
    total.add(ALL, first.copy())
    total.add(ROWS, second[ROWS])
    came = total.take()
    assert came.dtype == DTYPE
    np.testing.assert_array_equal(came, due.astype(DTYPE))


@pytest.mark.parametrize("whole", [False, True])
def test_more_parts_are_added_in_the_accumulation_dtype(whole):
    parts = draw(9)
    due = np.zeros(parts[0].shape)
    total = Sum(parts[0])
    for number, part in enumerate(parts):
        rows = ALL if whole or number % 2 else ROWS
        due[rows] += part[rows]
        total.add(rows, part[rows])
        total.settle()
    came = total.take()
    assert came.dtype == np.float32
    np.testing.assert_allclose(came, due, rtol=1e-6, atol=1e-6)


def test_nothing_is_zero():
    (like,) = draw(1)
    came = Sum(like).take()
    assert came.dtype == np.float32
    assert not came.any()


@pytest.mark.parametrize(("size", "wide"), [(1, False), (2, False), (3, True), (8, True)])
def test_shares_of_many_ranks_travel_in_the_accumulation_dtype(size, wide):
    (x,) = draw(1)
    kernels = SimpleNamespace(capabilities=Capabilities("fused", fused=True, half_gradients=True))
    forward = ForwardWork(x, x, x, None, None, score=Score(1.0), kernels=kernels, lengths=[9] * size)
    statistics = np.zeros(x.shape[:3], np.float32)
    backward = BackwardWork(forward, x, None, x, x, statistics, statistics, wanted=frozenset("qkv"))
    dtypes = {np.dtype(spec.dtype) for spec in backward.carried_specs(Move(0, 0))}
    assert dtypes == {np.dtype(np.float32 if wide or size == 1 else DTYPE)}


def test_a_sum_to_which_more_is_added_is_not_rounded_before():
    first, second = draw(2)
    total = Sum(first)
    total.add(ALL, first.copy())
    total.add(ROWS, second[ROWS])
    assert total.take(last=False).dtype == np.float32
