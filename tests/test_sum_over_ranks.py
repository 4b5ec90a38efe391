"""Sums of what every rank has of a replicated input's gradient: the same bits on all ranks."""

from __future__ import annotations

import numpy as np
import pytest

import ringcore
from ringcore.local import run_local
from ringcore.replicated import GatherWork, add_all, gather_plans
from ringcore.ring import ring
from ringcore.values import span


def shares(size, dtype="float32"):
    rng = np.random.default_rng(size)
    return [(rng.standard_normal((2, 3, 5)).astype(dtype), rng.standard_normal(4).astype(dtype)) for _ in range(size)]


def sums(work):
    return tuple(map(add_all, zip(*work.by_rank(), strict=True)))


@pytest.mark.parametrize("size", range(1, 9))
def test_every_rank_gets_equal_sums_of_all(size):
    given = shares(size)
    works = [GatherWork(arrays, rank, size) for rank, arrays in enumerate(given)]
    run_local([ring(plan, work) for plan, work in zip(gather_plans(size), works, strict=True)])
    found = [sums(work) for work in works]
    for place in range(2):
        due = sum(arrays[place].astype(float) for arrays in given)
        for came in found:
            assert came[place].shape == due.shape
            assert (came[place] == found[0][place]).all()
            assert np.abs(came[place] - due).max() < 1e-5


def test_visitors_memory_may_be_overwritten():
    work = GatherWork(shares(2)[0], 0, 2)
    first, second = (tuple(x.reshape(1, 1, 1, -1).copy() for x in arrays) for arrays in shares(2))
    due = [a + b for a, b in zip(first, second, strict=True)]
    work.visit(first, ())
    work.visit(second, ())
    for x in (*first, *second):
        x[...] = np.nan
    for came, expected in zip(sums(work), due, strict=True):
        assert (came.ravel() == expected.ravel()).all()


def test_each_block_visits_all_ranks_and_nothing_is_carried():
    for plan in gather_plans(4):
        assert all(span(step.tiles) == range(1) for step in plan.steps)  # what no tile reads is not fetched
        assert [step.block for step in plan.steps] == [(plan.rank - hop) % 4 for hop in range(4)]
        assert not GatherWork((), plan.rank, 4).carried_specs(plan.home[0] if plan.home else None)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_empty_prefix_is_none(library):
    xp = pytest.importorskip(library)
    rng = np.random.default_rng(5)
    q, k, v, dout = (xp.asarray(rng.standard_normal((1, 2, 6, 4))) for _ in range(4))
    keywords = {"causal": True, "ring_size": 2, "wrt": ("q", "k", "v")}
    (due, _), pullback = ringcore.ring_attention_vjp(q, k, v, **keywords)
    keywords |= {"wrt": ("q", "k", "v", "prefix_k", "prefix_v"), "prefix": (k[:, :, :0], v[:, :, :0])}
    (out, _), other = ringcore.ring_attention_vjp(q, k, v, **keywords)
    assert (out == due).all()
    *found, dk, dv = other(dout)
    assert all((x == y).all() for x, y in zip(found, pullback(dout), strict=True))
    assert dk.shape == dv.shape == (1, 2, 0, 4)
    work = GatherWork([dk], 0, 1)
    work.visit(work.visiting(), ())
    assert sums(work)[0].shape == dk.shape
