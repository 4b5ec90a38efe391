"""The tiled kernels against attention row by row in float64: any keyword, dtype, shape and size of blocks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import cupy
import ml_dtypes
import numpy as np
import pytest
from tile_rows import attend, draw, of_bias

import ringcore
from ringcore import Band, Gradients, Partial, empty_partial
from ringcore_cupy import Tiled, TileMemoryError
from ringcore_cupy.blocks import Sides, blocks

pytestmark = pytest.mark.timeout(120)
# Of scores; half weights are rounded before they are multiplied.
CLOSE = {"float64": 1e-12, "float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2}
SIZES = {"one block": Tiled(), "small blocks": Tiled(room=4 * 5 * 7 * 8, most_keys=7), "long rows": Tiled(room=1)}


def wide_of(case):
    return np.float64 if case.q.dtype == np.float64 else np.float32


def terms(case):
    return {
        "score": case.score,
        "tile": case.tile,
        "bias": None if case.bias is None else cupy.asarray(case.bias),
        "mask": None if case.mask is None else cupy.asarray(case.mask),
    }


def forward(kernels, case, state=None, make=cupy.asarray):
    return kernels.forward(*map(make, (case.q, case.k, case.v)), state=state, **terms(case))


def zeros(case, start=0.0):
    arrays = case.q, case.k, case.v, case.bias
    return Gradients(*(None if x is None else cupy.full(x.shape, start, dtype=wide_of(case)) for x in arrays))


def backward(kernels, case, truth, into=None, make=cupy.asarray):
    rows = (cupy.asarray(x.astype(wide_of(case))) for x in (truth.maximum, truth.total, truth.delta))
    arrays = map(make, (case.dout, case.q, case.k, case.v))
    into = zeros(case) if into is None else into
    assert kernels.backward(*arrays, *rows, into=into, **terms(case)) is into
    return into


def agree(came, due, close, name=""):
    came = cupy.asnumpy(came).astype(np.float64)
    assert came.shape == due.shape, name
    finite = np.isfinite(due)
    np.testing.assert_array_equal(came[~finite], due[~finite], err_msg=name)
    scale = max(1.0, np.abs(due[finite]).max(initial=0.0))
    assert np.abs(came[finite] - due[finite]).max(initial=0.0) <= close * scale, name


def check(case, kernels, **made):
    close, truth = CLOSE[case.q.dtype.name], attend(case)
    part = forward(kernels, case, **made)
    for name in ("weighted", "maximum", "total"):
        x = getattr(part, name)
        assert x.dtype == wide_of(case)
        agree(x, getattr(truth, name), close, name)
    found = backward(kernels, case, truth, **made)
    for name in ("dq", "dk", "dv"):
        agree(getattr(found, name), getattr(truth, name), 3 * close, name)
    if case.bias is not None:
        agree(found.dbias, of_bias(case, truth), 3 * close, "dbias")


BANDS = [
    Band(),
    Band(None, 0),
    Band(None, -3),
    Band(4, None),
    Band(-6, 2),
    Band(-40, 40),
    Band(9, 12),
    Band(1, 0),
    Band(40, None),
]


@pytest.mark.parametrize("kernels", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_bands(band, kernels):
    check(draw(band=band), kernels)


TERMS = {
    "nothing": {},
    "softcap": {"softcap": 1.3},
    "bias": {"bias": (2, 4, 23, 31)},
    "bias of keys": {"bias": (1, 1, 1, 31)},
    "bias of rows": {"bias": (2, 1, 23, 1)},
    "bias of heads": {"bias": (1, 4, 1, 1), "mask": (2, 1, 1, 31)},
    "mask": {"mask": (2, 4, 23, 31)},
    "everything": {"softcap": 2.0, "bias": (1, 4, 23, 31), "mask": (2, 1, 23, 31), "band": Band(-12, 3)},
}


@pytest.mark.parametrize("kernels", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("term", TERMS)
def test_terms_and_dtypes(term, dtype, kernels):
    check(draw(1, dtype=dtype, **TERMS[term]), kernels)


SHAPES = {
    "one row": {"rows": 1},
    "one key": {"keys": 1},
    "one of each": {"rows": 1, "keys": 1, "width": 1, "values": 1},
    "one head": {"heads": 1, "key_heads": 1, "batch": 1},
    "all heads read one": {"heads": 6, "key_heads": 1},
    "groups of 3": {"heads": 6, "key_heads": 2},
    "wide v": {"width": 3, "values": 40},
    "wide k": {"width": 70, "values": 2, "scale": 0.1},
    "tall": {"rows": 60, "keys": 9},
}


@pytest.mark.parametrize("kernels", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, kernels):
    check(draw(2, band=Band(-8, 1), mask=(1, 1, 1, 1), **SHAPES[shape]), kernels)


@pytest.mark.parametrize("empty", ["rows", "keys", "batch"])
def test_nothing_to_compute(empty):
    case = draw(**{empty: 0})
    part = forward(Tiled(), case)
    assert part.weighted.shape == (*case.q.shape[:3], case.v.shape[3])
    assert bool((part.maximum == -np.inf).all())
    assert not bool(part.weighted.any())
    assert not any(bool(getattr(backward(Tiled(), case, attend(case)), name).any()) for name in ("dq", "dk", "dv"))


def spread(x):
    """The same numbers among NaN: every axis has gaps, and the last one too."""
    x = cupy.asarray(x)
    room = cupy.full(tuple(2 * n + 1 for n in x.shape), np.nan, dtype=x.dtype)
    part = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    part[...] = x
    return part


def heads_last(x):
    return cupy.ascontiguousarray(cupy.asarray(x).swapaxes(1, 2)).swapaxes(1, 2)


def backwards(x):
    return cupy.ascontiguousarray(cupy.asarray(x)[:, ::-1, ::-1])[:, ::-1, ::-1]


@pytest.mark.parametrize("make", [spread, heads_last, backwards])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_arrays_that_lie_anywhere(dtype, make):
    check(draw(3, dtype=dtype, band=Band(None, 4)), SIZES["small blocks"], make=make)


@pytest.mark.parametrize("axis", [1, 2])
def test_one_head_or_row_serves_all(axis):
    case = draw(4, heads=2, key_heads=2)
    once = case.k[:, :1] if axis == 1 else case.k[:, :, :1]
    case = replace(case, k=np.repeat(once, case.k.shape[axis], axis=axis))

    def make(x):
        return cupy.broadcast_to(cupy.asarray(once), x.shape) if x is case.k else cupy.asarray(x)

    check(case, SIZES["small blocks"], make=make)


@pytest.mark.parametrize("kernels", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("make", [cupy.asarray, heads_last, spread])
def test_a_state_is_merged_into_in_place(make, kernels):
    case = draw(5, keys=40, band=Band(-9, 14), mask=(2, 4, 23, 40))
    truth, rows = attend(case), (2, 4, 23)
    # Either the maximum or the total says that a row saw nothing; what else stands there is not read.
    maximum, total = np.full(rows, -np.inf), np.full(rows, np.nan)
    maximum[:, :, ::2], total[:, :, ::2] = 900.0, 0.0
    state = Partial(*map(make, (np.full((*rows, 5), np.nan), maximum, total)))
    for first, last in ((0, 3), (3, 4), (4, 29), (29, 40)):
        part = replace(
            case, k=case.k[:, :, first:last], v=case.v[:, :, first:last], mask=case.mask[..., first:last],
            band=Band(-9 - first, 14 - first),
        )  # fmt: skip
        assert forward(kernels, part, state=state) is state
    agree(state.out, truth.out, 1e-12)
    agree(
        state.lse,
        np.where(truth.total > 0, truth.maximum + np.log(np.where(truth.total > 0, truth.total, 1)), -np.inf),
        1e-12,
    )


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_states_of_other_dtypes_and_of_one_total_for_all(kind):
    case, rows = draw(6, dtype="float32"), (2, 4, 23)
    truth = attend(case)
    ones = cupy.broadcast_to(cupy.ones((), dtype=np.float32), rows)
    state = Partial(cupy.zeros((*rows, 5), dtype=kind), cupy.zeros(rows, dtype=np.float32), ones)
    came = forward(Tiled(), case, state=state)
    before = Partial(np.zeros((*rows, 5)), np.zeros(rows), np.ones(rows))
    due = ringcore.merge(Partial(truth.weighted, truth.maximum, truth.total), before)
    agree(came.out, due.out, 3e-6)
    agree(came.lse, due.lse, 3e-6)
    assert bool((ones == 1).all())


def test_a_tile_that_shows_nothing_changes_nothing():
    case = draw(7, band=Band(40, None))
    state = Partial(cupy.ones((2, 4, 23, 5)), cupy.full((2, 4, 23), 3.0), cupy.full((2, 4, 23), 2.0))
    forward(Tiled(), case, state=state)
    assert bool((state.weighted == 1).all())
    masked = replace(case, band=Band(), mask=np.zeros((1, 1, 1, 1), dtype=bool))
    forward(Tiled(), masked, state=state)
    assert bool((state.weighted == 1).all())
    assert bool((state.total == 2).all())


def test_gradients_are_added_and_only_those_wanted():
    case = draw(8, bias=(2, 1, 23, 31), softcap=3.0)
    truth = attend(case)
    due = {"dq": truth.dq, "dk": truth.dk, "dv": truth.dv, "dbias": of_bias(case, truth)}
    for name, wanted in due.items():
        start = getattr(zeros(case, 5.0), name)
        came = backward(Tiled(), case, truth, into=Gradients(**{name: start}))
        agree(getattr(came, name), wanted + 5.0, 1e-11, name)
        assert getattr(came, name) is start
    backward(Tiled(), case, truth, into=Gradients())


def test_gradients_among_gaps_and_a_bias_of_another_dtype():
    case = draw(9, dtype="float32", bias=(1, 4, 1, 31))
    case = replace(case, bias=case.bias.astype(np.float64))
    truth = attend(case)
    into = Gradients(
        *(spread(np.zeros(x.shape, np.float32)) for x in (case.q, case.k, case.v)), cupy.zeros(case.bias.shape)
    )
    backward(SIZES["small blocks"], case, truth, into=into)
    for name in ("dq", "dk", "dv"):
        agree(getattr(into, name), getattr(truth, name), 1e-5, name)
    agree(into.dbias, of_bias(case, truth), 1e-5)


@pytest.mark.parametrize("dtype", CLOSE)
def test_rows_of_the_smallest_number_are_a_plain_average(dtype):
    case = draw(10, dtype=dtype, bias=(1, 1, 23, 31))
    bias = np.full_like(case.bias, ml_dtypes.finfo(case.bias.dtype).min)
    case = replace(case, bias=bias, q=np.zeros_like(case.q))
    part = forward(SIZES["small blocks"], case)
    due = np.repeat(case.v.astype(np.float64).mean(2, keepdims=True), 2, axis=1)
    agree(part.out, np.broadcast_to(due, part.weighted.shape), CLOSE[dtype])
    assert bool((part.total == 31).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign):
    case = draw(11, scale=sign * 3000.0, dtype="float32", band=Band(None, 2))
    truth = attend(case)
    part = forward(SIZES["small blocks"], case)
    agree(part.maximum, truth.maximum, 1e-6)
    assert bool(cupy.isfinite(part.out).all())


def test_rows_without_a_sum_give_no_gradient():
    case = draw(12, bias=(1, 4, 1, 31))
    truth = attend(case)
    maximum, total = truth.maximum.copy(), truth.total.copy()
    maximum[:, :, ::2], total[:, :, 1::2] = -np.inf, 0.0
    found = backward(Tiled(), case, replace(truth, maximum=maximum, total=total))
    assert not any(bool(getattr(found, name).any()) for name in ("dq", "dk", "dv", "dbias"))


@pytest.mark.parametrize(("sides", "dtype"), [("one block", "bfloat16"), ("small blocks", "float64")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("extra", ["", "mask", "bias", "softcap"])
def test_poison_reaches_only_what_sees_it(extra, name, value, sides, dtype):
    keywords = {"mask": {"mask": (2, 4, 30, 35)}, "bias": {"bias": (2, 4, 30, 35)}, "softcap": {"softcap": 2.0}}
    case = draw(13, rows=30, keys=35, width=3, dtype=dtype, band=Band(-15, 3), **keywords.get(extra, {}))
    if extra == "bias":
        case.bias[np.random.default_rng(1).random(case.bias.shape) < 0.2] = -np.inf
    x = getattr(case, name).copy()
    x[0, 1, 17] = value
    x[1, 0, 24, 1] = value
    case, worst = replace(case, **{name: x}), replace(case, **{name: np.where(np.isfinite(x), x, np.nan)})
    truth, most = attend(case), attend(worst)  # a bounded infinity may also show where NaN would
    part = forward(SIZES[sides], case)
    came = cupy.asnumpy(part.weighted)
    good = np.isfinite(truth.weighted).all(-1) & np.isfinite(truth.total) & ~np.isnan(truth.maximum)
    np.testing.assert_array_equal(np.isfinite(came).all(-1) & np.isfinite(cupy.asnumpy(part.total)), good)
    assert good.any()
    assert np.abs(came[good] - truth.weighted[good]).max() < 5 * CLOSE[dtype]
    found = backward(SIZES[sides], case, truth)
    for field in ("dq", "dk", "dv"):
        due, came = getattr(truth, field), cupy.asnumpy(getattr(found, field))
        finite, hurt = np.isfinite(came).all(-1), ~np.isfinite(getattr(most, field)).all(-1)
        assert not (finite & ~np.isfinite(due).all(-1)).any(), field
        assert (finite | hurt).all(), field
        assert np.abs(came[finite] - due[finite]).max() < 10 * CLOSE[dtype]


def test_a_state_stays_poisoned():
    case = draw(14, rows=3, keys=20)
    x = case.v.copy()
    x[:, :, 2] = np.nan
    part = forward(SIZES["small blocks"], replace(case, v=x))
    assert bool(cupy.isnan(part.weighted).all())
    k = case.k.copy()
    k[:, :, 2] = np.nan
    part = forward(SIZES["small blocks"], replace(case, k=k))
    assert bool(cupy.isnan(part.maximum).all())


def test_work_goes_on_after_memory_ran_out():
    case, pool = draw(15, rows=64, keys=64), cupy.get_default_memory_pool()
    arrays = [cupy.asarray(x) for x in (case.q, case.k, case.v)]
    state = empty_partial(arrays[0], 5)
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + 4096)
    taken = []
    try:
        for size in (1 << 26, 1 << 20, 1 << 14, 512):  # what lies free in the pool counts as taken already
            with suppress(cupy.cuda.memory.OutOfMemoryError):
                while True:
                    taken.append(cupy.empty(size, dtype=np.uint8))
        with pytest.raises(
            TileMemoryError, match=r"64 rows x 64 keys with 4 heads needs 1\d\d,\d{3} bytes beside its arrays"
        ) as caught:
            Tiled().forward(*arrays, state=state, **terms(case))
    finally:
        pool.set_limit(size=0)
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, ringcore.RingcoreError)
    assert not bool(state.weighted.any())
    Tiled().forward(*arrays, state=state, **terms(case))
    agree(state.out, attend(case).out, 1e-12)


def test_the_scratch_does_not_grow_with_the_tile(monkeypatch):
    made = []
    original = cupy.empty
    monkeypatch.setattr(cupy, "empty", lambda *args, **more: made.append(original(*args, **more)) or made[-1])
    case = draw(16, batch=1, heads=2, key_heads=1, rows=150, keys=150, dtype="float32")
    kernels = Tiled(room=2 * 32 * 64 * 4, most_keys=64)
    forward(kernels, case)
    backward(kernels, case, attend(replace(case, band=Band(1, 0))))
    assert max(x.nbytes for x in made) <= 2 * 32 * 64 * 4


def test_blocks_are_near_to_squares():
    assert Sides.of(16, 9000, 9000, 8 << 20, 1024) == (512, 1024)
    assert Sides.of(128, 9000, 9000, 8 << 20, 1024) == (256, 256)
    assert Sides.of(1, 9000, 9000, 8 << 20, 1024) == (2048, 1024)
    assert Sides.of(16, 100, 70, 8 << 20, 1024) == (100, 70)


def test_blocks_outside_of_the_band_are_not_visited():
    found = list(blocks(Band(None, 0), 64, 64, Sides(16, 16)))
    assert len(found) == 10
    assert sum(block.height * block.width for block in blocks(Band(-3, 3), 640, 640, Sides(16, 16))) < 30 * 640


def test_no_gpu_is_said(monkeypatch):
    from ringcore_cupy.tiled import load

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(ringcore.UnsupportedError, match="CuPy finds no GPU"):
        load()


def test_they_are_taken_and_say_so():
    q = cupy.ones((1, 2, 8, 4))
    assert "kernels  cupy.cuda.tiled" in str(
        ringcore.explain(q, q, q, ring_size=2, bias=cupy.ones((8, 8)), softcap=3.0)
    )
