"""Partials in CuPy, each step in one pass, against ringcore's merge in float64."""

from __future__ import annotations

import cupy
import ml_dtypes
import numpy as np
import pytest

import ringcore
from ringcore import Partial
from ringcore_cupy import partials

pytestmark = pytest.mark.timeout(120)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KINDS = {name: np.dtype(name) for name in ("float64", "float32", "float16")} | {"bfloat16": BFLOAT16}
CLOSE = {"float64": 1e-14, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
ALL = slice(None)


def wide_of(kind):
    return np.dtype(np.float64 if kind == np.float64 else np.float32)


def draw(seed, kind, shape=(2, 3, 40, 33), finished=False, garbage=True):
    """weighted, maximum and total; every fifth row saw no key, under which there is NaN."""
    rng = np.random.default_rng(seed)
    wide = wide_of(kind)
    weighted, maximum = rng.standard_normal(shape).astype(kind), (rng.standard_normal(shape[:3]) * 20).astype(wide)
    total = np.ones((), wide) if finished else rng.random(shape[:3]).astype(wide) + 0.5
    total = np.broadcast_to(total, shape[:3]) if finished else total
    empty = rng.random(shape[:3]) < 0.2
    weighted[empty] = np.nan if garbage else 0
    without_total = empty & (rng.random(shape[:3]) < 0.5) & (not finished)
    maximum[empty & ~without_total] = -np.inf
    if not finished:
        total[empty], total[without_total] = np.nan, 0.0  # either maximum or total says so
    return Partial(weighted, maximum, total)


def on_gpu(part, make=cupy.asarray):
    one = not any(part.total.strides) and part.total.size > 1
    total = cupy.broadcast_to(cupy.ones((), dtype=part.total.dtype), part.total.shape) if one else make(part.total)
    return Partial(make(part.weighted), make(part.maximum), total)


def merged(first, second):
    return ringcore.merge(*(Partial(*(np.array(x, np.float64) for x in fields(part))) for part in (first, second)))


def fields(part):
    return part.weighted, part.maximum, part.total


def agree(came, due, close):
    came = cupy.asnumpy(came).astype(np.float64)
    assert came.shape == due.shape
    same = came == due  # infinities, too
    np.testing.assert_allclose(came[~same], due[~same], rtol=close, atol=close)


def heads_last(x):
    return cupy.ascontiguousarray(cupy.asarray(x).swapaxes(1, 2)).swapaxes(1, 2)


def spread(x):
    x = cupy.asarray(x)
    room = cupy.full(tuple(2 * n + 1 for n in x.shape), np.nan, dtype=x.dtype)
    part = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    part[...] = x
    return part


def backwards(x):
    return cupy.ascontiguousarray(cupy.asarray(x)[::-1, :, ::-1])[::-1, :, ::-1]


PLACES = {
    "all": (ALL, ALL, ALL, ...),
    "some": (ALL, slice(1, 3), slice(5, 33), ...),
    "strided": (slice(1, 2), ALL, slice(3, 40, 4), ...),
    "one row": (slice(0, 1), slice(2, 3), slice(7, 8), ...),
    "none": (ALL, ALL, slice(4, 4), ...),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("make", [cupy.asarray, heads_last, backwards, spread])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_merged_in_place(kind, make, place):
    rows = PLACES[place]
    first, second = draw(1, wide_of(KINDS[kind])), draw(2, KINDS[kind])
    second = Partial(*(x[rows] for x in fields(second)))
    state = on_gpu(first, make)
    came = partials.merge_rows(state, rows, on_gpu(second, make))
    for mine, given in zip(fields(came), fields(state), strict=True):
        assert mine is given
    due = merged(Partial(*(x[rows] for x in fields(first))), second)
    seen = cupy.asnumpy(came.seen[rows])
    np.testing.assert_array_equal(seen, due.seen)
    for name in ("weighted", "maximum", "total"):
        agree(cupy.asnumpy(getattr(came, name)[rows])[seen], getattr(due, name)[seen], CLOSE[wide_of(KINDS[kind]).name])
        outside = np.ones(first.weighted.shape[:3], dtype=bool)
        outside[rows] = False
        kept = cupy.asnumpy(getattr(came, name))[outside]
        np.testing.assert_array_equal(kept, getattr(first, name)[outside])


def test_a_part_alone_may_have_gaps():
    first, second = draw(19, KINDS["float32"]), draw(20, KINDS["float32"])
    out, *_ = partials.finished(on_gpu(first), np.float32, (PLACES["all"], on_gpu(second, spread)))
    agree(out, merged(first, second).out, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_partial_changes_nothing_bit_for_bit(kind):
    wide = wide_of(KINDS[kind])
    part = draw(3, KINDS[kind], garbage=False)
    part.weighted[0, 0, 0, :3] = [-0.0, 0.0, 1e-7]
    part = Partial(
        part.weighted,
        np.where(part.seen, part.maximum, wide.type(3)),
        np.where(part.seen, part.total, wide.type(1)),
    )
    nothing = Partial(*(np.full(x.shape, n, wide) for x, n in zip(fields(part), (np.nan, -np.inf, 0.0), strict=True)))
    for first, second in ((nothing, part), (part, nothing)):
        state = on_gpu(Partial(first.weighted.astype(wide), *fields(first)[1:]))
        came = partials.merge_rows(state, PLACES["all"], on_gpu(second))
        for mine, due in zip(fields(came), fields(part), strict=True):
            mine, due = cupy.asnumpy(mine), due.astype(wide)
            assert mine.tobytes() == due.tobytes()


@pytest.mark.parametrize("maximum", [-np.inf, 3.0])
def test_two_empty_rows_are_an_empty_row(maximum):
    def nothing():
        return Partial(cupy.full((1, 2, 3, 4), np.nan), cupy.full((1, 2, 3), maximum), cupy.zeros((1, 2, 3)))

    came = partials.merge_rows(nothing(), PLACES["all"], nothing())
    assert not bool(came.weighted.any())
    assert bool((came.maximum == -np.inf).all())
    assert not bool(came.total.any())


def test_poison_in_a_row_that_saw_a_key_shows():
    for name in ("weighted", "maximum", "total"):
        for place in (0, 1):
            both = [draw(seed, np.dtype(np.float32), garbage=False) for seed in (4, 5)]
            for part in both:
                part.maximum[0, 0, 0], part.total[0, 0, 0] = 1.0, 1.0
            getattr(both[place], name)[0, 0, 0] = np.nan
            came = partials.merge_rows(on_gpu(both[0]), PLACES["all"], on_gpu(both[1]))
            assert bool(cupy.isnan(came.out[0, 0, 0]).all())
            assert name != "maximum" or bool(cupy.isnan(came.maximum[0, 0, 0]))
            assert bool(cupy.isfinite(came.out[0, 0, 1:]).all())


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("place", PLACES)
def test_two_finished_partials_become_one_in_the_memory_of_the_first(kind, place):
    rows = PLACES[place]
    first, second = (
        draw(6, KINDS[kind], finished=True, garbage=False),
        draw(7, KINDS[kind], finished=True, garbage=False),
    )
    second = Partial(*(x[rows] for x in fields(second)))
    if second.total.size == 1:
        second = Partial(second.weighted, second.maximum, second.total.copy())
    state, due = on_gpu(first), merged(Partial(*(x[rows] for x in fields(first))), second)
    out, maximum, total = partials.finished(state, KINDS[kind], (rows, on_gpu(second)))
    assert out.dtype == KINDS[kind]
    if place not in ("one row", "none"):
        assert out is state.weighted
        assert total is state.total
    found = Partial(out, maximum, total)
    agree(out[rows], due.out, CLOSE[kind])
    agree(found.lse[rows], due.lse, CLOSE[wide_of(KINDS[kind]).name])
    outside = np.ones(first.weighted.shape[:3], dtype=bool)
    outside[rows] = False
    agree(cupy.asnumpy(out)[outside], first.weighted[outside].astype(np.float64), CLOSE[kind])
    agree(cupy.asnumpy(found.lse)[outside], first.maximum[outside].astype(np.float64), CLOSE[wide_of(KINDS[kind]).name])


@pytest.mark.parametrize("make", [cupy.asarray, heads_last, backwards, spread])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_divided(kind, make):
    part = draw(8, wide_of(KINDS[kind]))
    due = Partial(*(x.astype(np.float64) for x in fields(part))).out
    state = on_gpu(part, make)
    out, maximum, total = partials.finished(state, KINDS[kind])
    assert out.dtype == KINDS[kind]
    assert maximum is state.maximum
    assert total is state.total
    agree(out, due, CLOSE[kind])
    if make is heads_last:
        assert out.strides[1] < out.strides[2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_partial_is_merged_as_sums_are_divided(kind):
    first, second = draw(9, wide_of(KINDS[kind])), draw(10, KINDS[kind])
    out, maximum, total = partials.finished(on_gpu(first), KINDS[kind], (PLACES["all"], on_gpu(second)))
    due = merged(first, second)
    agree(out, due.out, CLOSE[kind])
    agree(Partial(out, maximum, total).lse, due.lse, CLOSE[wide_of(KINDS[kind]).name])


def test_what_a_fused_kernel_finished_stays_as_it_is():
    part = on_gpu(draw(11, KINDS["float16"], finished=True, garbage=False))
    assert partials.finished(part, KINDS["float16"])[0] is part.weighted


def test_one_total_for_all_rows_is_never_written_to():
    first, second = draw(12, KINDS["float16"], finished=True, garbage=False), draw(13, KINDS["float16"])
    state = on_gpu(first)
    came = partials.merge_rows(state, PLACES["some"], on_gpu(Partial(*(x[PLACES["some"]] for x in fields(second)))))
    assert came.weighted.dtype == np.float32
    assert bool((state.total == 1).all())


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("make", [cupy.asarray, heads_last, spread])
@pytest.mark.parametrize("empty", [np.inf, -np.inf, 7.0])
def test_lse(kind, make, empty):
    part = draw(14, KINDS[kind])
    lse = partials.finished_lse(make(part.maximum), make(part.total), empty)
    assert lse.flags.c_contiguous
    due = np.where(part.seen, Partial(*(x.astype(np.float64) for x in fields(part))).lse, empty)
    agree(lse, due, CLOSE[kind])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 1, 300), (1, 1, 3000, 2), (0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)]
)
def test_shapes(shape):
    first, second = (draw(seed, np.dtype(np.float32), shape) for seed in (15, 16))
    out, *_ = partials.finished(on_gpu(first), np.float32, (PLACES["all"], on_gpu(second)))
    agree(out, merged(first, second).out, 2e-6)


def test_more_heads_than_a_grid_takes():
    first, second = (draw(seed, np.dtype(np.float32), (66000, 1, 1, 2)) for seed in (17, 18))
    out, *_ = partials.finished(on_gpu(first), np.float32, (PLACES["all"], on_gpu(second)))
    agree(out, merged(first, second).out, 2e-6)
    lse = partials.finished_lse(cupy.asarray(second.maximum), cupy.asarray(second.total), np.inf)
    agree(lse, np.where(second.seen, Partial(*(x.astype(np.float64) for x in fields(second))).lse, np.inf), 2e-6)


def test_ringcore_finds_them():
    from ringcore.discovery import find_arithmetic

    assert find_arithmetic(cupy.ones((1, 1, 1, 1))) is partials
