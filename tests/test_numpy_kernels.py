"""The NumPy kernels against dense attention, written out in float64 with nothing clever."""

from __future__ import annotations

import os
import threading
import time
import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

np_kernels = pytest.importorskip("ringcore_numpy")
ml_dtypes = pytest.importorskip("ml_dtypes")
threadpoolctl = pytest.importorskip("threadpoolctl")

from ringcore.partial import Partial  # noqa: E402
from ringcore.protocols import Kernels  # noqa: E402
from ringcore.values import Band, Gradients, Score, Tile  # noqa: E402
from ringcore_numpy import NumpyKernels, backward, forward, load  # noqa: E402

INF = np.inf
BANDS = [
    Band(),
    Band(None, 0),
    Band(0, None),
    Band(-3, 5),
    Band(None, -4),
    Band(7, None),
    Band(-40, -20),
    Band(3, 2),
    Band(1000, None),
    Band(None, -1000),
]


@dataclass(frozen=True)
class Case:
    q: Any
    k: Any
    v: Any
    dout: Any
    score: Score
    band: Band = Band()  # noqa: RUF009  # frozen
    bias: Any = None
    mask: Any = None

    @property
    def tile(self) -> Tile:
        every = slice(None)
        rows, columns = range(self.q.shape[2]), range(self.k.shape[2])
        return Tile(every, every, every, every, every, (rows,), (columns,), self.band)


def case(seed=0, B=2, H=4, Hk=2, S=40, T=50, D=8, E=5, dtype=np.float64, scale=0.3, softcap=None, spread=1.0, **more):  # noqa: N803
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (spread * rng.standard_normal(shape)).astype(dtype)  # noqa: E731
    arrays = draw(B, H, S, D), draw(B, Hk, T, D), draw(B, Hk, T, E), draw(B, H, S, E)
    return Case(*arrays, Score(scale, softcap), **more)


@dataclass(frozen=True)
class Dense:
    maximum: Any
    total: Any
    weighted: Any
    out: Any
    delta: Any
    dq: Any
    dk: Any
    dv: Any
    dscore: Any


def dense(c: Case) -> Dense:
    """Every pair at once. Only what is visible enters a sum: hidden terms are chosen away, not multiplied by 0."""
    q, k, v, dout = (np.asarray(x, dtype=np.float64) for x in (c.q, c.k, c.v, c.dout))
    B, H, S, _ = q.shape
    group = H // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    T = k.shape[2]
    with np.errstate(all="ignore"):
        s = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1) * c.score.scale
        slope = np.ones_like(s)
        if c.score.softcap is not None:
            s = c.score.softcap * np.tanh(s / c.score.softcap)
            slope = 1 - (s / c.score.softcap) ** 2
        gap = np.arange(T)[None, :] - np.arange(S)[:, None]
        visible = np.ones((B, H, S, T), dtype=bool)
        if c.band.lo is not None:
            visible &= gap >= c.band.lo
        if c.band.hi is not None:
            visible &= gap <= c.band.hi
        if c.mask is not None:
            visible &= c.mask
        if c.bias is not None:
            bias = np.broadcast_to(np.asarray(c.bias, dtype=np.float64), s.shape)
            visible &= bias != -INF
            s = s + np.where(visible, bias, 0)
        s = np.where(visible, s, -INF)
        maximum = s.max(axis=-1, initial=-INF)
        seen = visible.any(-1)
        e = np.where(visible, np.exp(s - np.where(seen, maximum, 0)[..., None]), 0)
        total = e.sum(-1)
        pick = lambda x: np.where(visible[..., None], x, 0)  # noqa: E731
        weighted = pick(e[..., None] * v[:, :, None]).sum(3)
        safe = np.where(seen, total, 1)
        out = weighted / safe[..., None]
        delta = (dout * out).sum(-1)
        p = e / safe[..., None]
        dp = (dout[:, :, :, None, :] * v[:, :, None, :, :]).sum(-1)
        dscore = np.where(visible, p * (dp - delta[..., None]), 0)
        ds = np.where(visible, dscore * slope, 0)
        fold = lambda x: x.reshape(B, H // group, group, T, x.shape[-1]).sum(2)  # noqa: E731
        dq = pick(ds[..., None] * k[:, :, None]).sum(3) * c.score.scale
        dk = fold(pick(ds[..., None] * q[:, :, :, None]).sum(2) * c.score.scale)
        dv = fold(pick(p[..., None] * dout[:, :, :, None]).sum(2))
    return Dense(maximum, total, weighted, out, delta, dq, dk, dv, dscore)


def run_forward(c: Case, kernels=None, state=None) -> Partial:
    kernels = kernels or NumpyKernels(2)
    return kernels.forward(c.q, c.k, c.v, score=c.score, tile=c.tile, bias=c.bias, mask=c.mask, state=state)


def zeros(c: Case, start=0.0) -> Gradients:
    wide = np.float64 if c.q.dtype == np.float64 else np.float32
    dbias = None if c.bias is None else np.full(c.bias.shape, start, dtype=wide)
    return Gradients(*(np.full(x.shape, start, dtype=wide) for x in (c.q, c.k, c.v)), dbias)


def run_backward(c: Case, d: Dense, kernels=None, into=None) -> Gradients:
    kernels = kernels or NumpyKernels(2)
    into = into or zeros(c)
    wide = np.float64 if c.q.dtype == np.float64 else np.float32
    rows = (x.astype(wide, copy=False) for x in (d.maximum, d.total, d.delta))
    got = kernels.backward(
        c.dout, c.q, c.k, c.v, *rows, score=c.score, tile=c.tile, bias=c.bias, mask=c.mask, into=into
    )
    assert got is into
    return got


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("step", [2, 4, 5])
def test_backward_reads_strided_statistics(dtype, step):
    c = case(dtype=dtype, band=Band(-9, 3))
    d = dense(c)
    wide = [np.repeat(x.astype(dtype), step, axis=-1)[..., ::step] for x in (d.maximum, d.total, d.delta)]
    got = run_backward(c, replace(d, maximum=wide[0], total=wide[1], delta=wide[2]))
    for name in ("dq", "dk", "dv"):
        close(getattr(got, name), getattr(d, name), 1e-5 if dtype is np.float32 else 1e-12, name)


def close(got, want, tolerance, name=""):
    assert got.shape == want.shape
    finite = want[np.isfinite(want)]
    largest = max(1.0, np.abs(finite).max()) if finite.size else 1.0
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest, err_msg=name)


def dbias_of(c: Case, d: Dense):
    axes = tuple(axis for axis, length in enumerate(c.bias.shape) if length == 1)
    return d.dscore.sum(axis=axes, keepdims=True).reshape(c.bias.shape)


def same_partial(got: Partial, d: Dense, tolerance):
    """A kernel's reference may lag behind the largest score, but then its sums follow from it."""
    empty = d.maximum == -INF
    np.testing.assert_array_equal(got.maximum == -INF, empty)
    lag = np.where(empty, 0, got.maximum) - np.where(empty, 0, d.maximum)
    assert (np.abs(lag) <= 2 * forward._SLACK).all()
    close(got.total * np.exp(lag), d.total, tolerance, "total")
    close(got.weighted * np.exp(lag)[..., None], d.weighted, tolerance, "weighted")


def check(c: Case, tolerance=1e-12, gradient=1e-10, kernels=None):
    d = dense(c)
    got = run_forward(c, kernels)
    empty = d.maximum == -INF
    for x in (got.total[empty], got.weighted[empty]):
        np.testing.assert_array_equal(x, 0)
    same_partial(got, d, tolerance)
    close(got.out, d.out, tolerance, "out")
    grad = run_backward(c, d, kernels)
    for name in ("dq", "dk", "dv"):
        close(getattr(grad, name), getattr(d, name), gradient, name)
    if c.bias is not None:
        close(grad.dbias, dbias_of(c, d), gradient, "dbias")


@pytest.fixture
def large_tiles():
    """Tiles as they ship."""


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Tiles of a few rows and keys, so that small arrays cross every border."""
    if "large_tiles" in request.fixturenames:
        return
    monkeypatch.setattr(forward, "_ROWS", 16)
    monkeypatch.setattr(forward, "_STEP", 6)
    monkeypatch.setattr(forward, "_KEYS", 24)
    monkeypatch.setattr(forward, "_FEWEST", 1)  # several blocks to a strip
    monkeypatch.setattr(backward, "_LARGE", 16)
    monkeypatch.setattr(backward, "_SMALL", 8)
    monkeypatch.setattr(backward, "_KEYS", 32)


@pytest.mark.parametrize("band", BANDS, ids=str)
def test_bands(band):
    check(case(band=band))


@pytest.mark.parametrize("seed", range(25))
def test_random_bands_and_shapes(seed):
    rng = np.random.default_rng(seed)
    S, T = rng.integers(1, 90, 2)
    bound = lambda: None if rng.random() < 0.3 else int(rng.integers(-S - 5, T + 5))  # noqa: E731
    Hk, group, D, E = rng.integers(1, 4, 4)
    check(case(seed, B=1, H=Hk * group, Hk=Hk, S=S, T=T, D=D, E=E, band=Band(bound(), bound())))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_nothing_to_see(shape):
    check(case(S=shape[0], T=shape[1]))
    c = case(S=shape[0], T=shape[1])
    state = Partial(np.full((2, 4, shape[0], 5), 2.0), np.full((2, 4, shape[0]), 3.0), np.full((2, 4, shape[0]), 4.0))
    if shape[1] == 0:
        got = run_forward(c, state=state)
        assert got.weighted is state.weighted
        assert (got.weighted == 2).all()
        assert (got.maximum == 3).all()
        assert (got.total == 4).all()


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(
    "band", [Band(), Band(None, 0), Band(-300, 10), Band(-900, 600), Band(None, 700), Band(-1200, None)], ids=str
)
def test_tiles_as_they_ship(band):
    check(case(B=1, H=2, Hk=1, S=700, T=1300, D=4, E=4, band=band))


@pytest.mark.usefixtures("large_tiles")
def test_float32_as_it_ships():
    check(case(B=1, H=1, Hk=1, S=600, T=1100, D=32, E=32, band=Band(None, 500), dtype=np.float32), 3e-6, 1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 4, 40, 50), (1, 4, 1, 50), (2, 1, 40, 1), (1, 1, 40, 50), (2, 1, 1, 1)]
)
@pytest.mark.parametrize("band", [Band(), Band(None, 3), Band(-9, 9)], ids=str)
def test_bias(shape, band):
    rng = np.random.default_rng(5)
    bias = rng.standard_normal(shape)
    if bias.size > 1000:
        bias[rng.random(shape) < 0.2] = -INF
        bias[rng.random(shape) < 0.1] = np.finfo(np.float64).min
        bias[:, :, 3] = -INF
        bias[:, :, 4] = np.finfo(np.float64).min
    for threads in (1, 3):
        check(case(band=band, bias=bias), kernels=NumpyKernels(threads))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_the_smallest_number_are_a_plain_average(dtype):
    bias = np.full((1, 1, 1, 50), np.finfo(dtype).min, dtype=dtype)
    c = case(bias=bias, dtype=dtype)
    got = run_forward(c)
    np.testing.assert_allclose(got.total, 50, rtol=1e-6)
    check(c, *((1e-12, 1e-10) if dtype is np.float64 else (1e-5, 1e-5)))
    # A later tile without a bias takes over, to the last digit.
    later = run_forward(replace(c, bias=None), state=got)
    close(later.out, dense(replace(c, bias=None)).out, 1e-12 if dtype is np.float64 else 1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 40, 50), (1, 1, 1, 50), (1, 4, 40, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("band", [Band(), Band(None, 3)], ids=str)
def test_mask(shape, band):
    check(case(mask=np.random.default_rng(1).random(shape) < 0.4, band=band))


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap_comes_before_bias_and_mask(softcap):
    rng = np.random.default_rng(2)
    check(case(softcap=softcap, scale=1.5, band=Band(None, 4)))
    bias, mask = rng.standard_normal((1, 4, 40, 50)), rng.random((2, 1, 40, 50)) < 0.7
    check(case(softcap=softcap, scale=1.5, bias=bias, mask=mask, band=Band(-20, 4)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("careful", [False, True])
def test_half_types_sum_in_float32(dtype, careful):
    bias = np.random.default_rng(3).standard_normal((1, 4, 1, 50)).astype(dtype) if careful else None
    c = case(dtype=dtype, band=Band(None, 6), bias=bias)
    assert run_forward(c).weighted.dtype == np.float32
    check(c, 5e-6, 2e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(scale, sign):
    c = case(scale=scale, D=4, band=Band(None, 8))
    q = np.abs(c.q)  # scores of one sign, so that references must go down as well as up
    c = replace(c, q=q, k=sign * np.abs(c.k))
    check(c, 1e-14 * max(scale, 100), max(1e-10, 1e-14 * scale))


def test_references_move_block_by_block():
    c = case(scale=1.0)
    for slope in (0.7, -0.7, 300.0, -300.0):
        k = c.k.copy()
        k[..., 0] = slope * np.arange(50)
        q = c.q.copy()
        q[..., 0] = 1
        check(replace(c, q=q, k=k), 1e-10, 1e-9)


def test_a_reference_far_away_costs_no_digits():
    c = case(dtype=np.float32, scale=1.0)
    q, k = c.q.copy(), c.k.copy()
    q[..., 0] = 1
    k[..., 0] = np.where(np.arange(50) < 24, -6e4, 0)  # the first block of keys
    k[:, :, :24, 1:] = 0
    check(replace(c, q=q, k=k), 1e-5, 1e-5)
    # The references of the first chunk would drown the differences of the second.
    c = case(B=4, S=1, dtype=np.float32, scale=1.0)
    state = run_forward(replace(c, bias=np.full((1, 1, 1, 1), -1e30, np.float32)))
    huge = replace(c, score=Score(1e25))
    close(run_forward(huge, state=state).out, dense(huge).out, 1e-5)


def test_rows_without_a_sum_give_no_gradient():
    for bias in (None, np.full((1, 1, 1, 50), 1e4)):
        c = case(band=Band(None, 3), bias=bias, scale=30.0)
        d = dense(c)
        dout, q = c.dout.copy(), c.q.copy()
        d.maximum[:, :, 7], d.total[:, :, 9] = -INF, 0
        for x in (dout, q):
            x[:, :, 7] = np.nan
        got = run_backward(replace(c, dout=dout, q=q), d)
        dout[:, :, [7, 9]] = 0
        q[:, :, 7] = c.q[:, :, 7]
        d = dense(replace(c, dout=dout))
        for name in ("dq", "dk", "dv"):
            close(getattr(got, name), getattr(d, name), 1e-10, name)


def split(c: Case, cuts):
    """The case by chunks of keys: each one's band is shifted, its bias and mask cut."""
    edges = [0, *cuts, c.k.shape[2]]
    for start, stop in pairwise(edges):
        band = Band(*(None if bound is None else bound - start for bound in (c.band.lo, c.band.hi)))
        part = {n: getattr(c, n) for n in ("bias", "mask")}
        part = {n: x if x is None or x.shape[3] == 1 else x[..., start:stop] for n, x in part.items()}
        yield slice(start, stop), replace(c, k=c.k[:, :, start:stop], v=c.v[:, :, start:stop], band=band, **part)


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("extra", ["", "bias", "softcap"])
def test_chunks_of_keys_chain_in_place(band, extra):
    bias = np.random.default_rng(6).standard_normal((2, 1, 40, 50)) if extra == "bias" else None
    c = case(band=band, bias=bias, softcap=3.0 if extra == "softcap" else None, scale=2.0)
    d = dense(c)
    big = np.full((2, 4, 45, 9), np.nan)  # the state lies inside bigger arrays, whose rest is left alone
    rows = np.full((2, 2, 4, 80), np.nan)
    state = Partial(big[:, :, 2:42, 1:6], rows[0][:, :, ::2], rows[1][:, :, ::2])
    state.weighted[...], state.maximum[...], state.total[...] = 0, -INF, 0
    into = zeros(c)
    for part, chunk in split(c, [11, 12, 33]):
        state_after = run_forward(chunk, state=state)
        assert state_after.weighted is state.weighted
        dbias = into.dbias if into.dbias is None else into.dbias[..., part]
        run_backward(chunk, d, into=Gradients(into.dq, into.dk[:, :, part], into.dv[:, :, part], dbias))
    same_partial(state, d, 1e-12)
    assert np.isnan(big[:, :, 42:]).all()
    assert np.isnan(big[..., 6:]).all()
    assert np.isnan(rows[..., 1::2]).all()
    for name in ("dq", "dk", "dv"):
        close(getattr(into, name), getattr(d, name), 1e-10, name)
    if bias is not None:
        close(into.dbias, dbias_of(c, d), 1e-10)


def test_what_unseen_rows_of_a_state_hold_is_never_read():
    c = case(band=Band(None, 3))
    shape = (2, 4, 40)
    for maximum, total in ((-INF, 5.0), (2.0, 0.0)):
        state = Partial(np.full((*shape, 5), np.nan), np.full(shape, maximum), np.full(shape, total))
        same_partial(run_forward(c, state=state), dense(c), 1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_strided_views_and_read_only_arrays(dtype):
    c = case(dtype=dtype, band=Band(-30, 12))

    def scatter(x):
        room = np.full((x.shape[2] * 2, x.shape[0], x.shape[3] * 3, x.shape[1]), np.nan, dtype=dtype)
        view = room.transpose(1, 3, 0, 2)[:, :, ::-2, ::3]
        view[...] = x
        view.flags.writeable = False
        return view

    views = {name: scatter(getattr(c, name)) for name in ("q", "k", "v", "dout")}
    before = {name: x.copy() for name, x in views.items()}
    tolerance = (1e-12, 1e-10) if dtype is np.float64 else (5e-6, 3e-5)
    check(replace(c, **views), *tolerance)
    for name, x in before.items():
        np.testing.assert_array_equal(views[name], x)
    wide = np.float64 if dtype is np.float64 else np.float32
    into = Gradients(
        *(np.zeros((2, x.shape[2], x.shape[1], x.shape[3]), wide).transpose(0, 2, 1, 3) for x in (c.q, c.k, c.v))
    )
    run_backward(c, dense(c), into=into)
    close(into.dk, dense(c).dk, tolerance[1])


def test_gradients_are_added_and_only_those_wanted():
    c = case(band=Band(None, 2), bias=np.zeros((1, 1, 40, 1)))
    d = dense(c)
    full = run_backward(c, d, into=zeros(c, 1.5))
    for name in ("dq", "dk", "dv"):
        close(getattr(full, name) - 1.5, getattr(d, name), 1e-10, name)
    close(full.dbias - 1.5, dbias_of(c, d), 1e-10)
    for bias in (c.bias, None):
        for name in ("dq", "dk", "dv"):
            only = run_backward(replace(c, bias=bias), d, into=Gradients(**{name: getattr(zeros(c), name)}))
            close(getattr(only, name), getattr(d, name), 1e-10, name)
    only = run_backward(c, d, into=Gradients(dbias=zeros(c).dbias))
    close(only.dbias, dbias_of(c, d), 1e-10)
    run_backward(c, d, into=Gradients())


POISONS = [np.nan, INF, -INF]


@pytest.mark.parametrize("value", POISONS)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("extra", ["", "mask", "bias", "state"])
def test_poison_reaches_only_the_rows_that_see_it(value, name, extra):
    rng = np.random.default_rng(7)
    c = case(band=Band(-25, 3), D=3)
    if extra == "mask":
        c = replace(c, mask=rng.random((2, 4, 40, 50)) < 0.8)
    if extra == "bias":
        c = replace(c, bias=np.where(rng.random((2, 4, 40, 50)) < 0.2, -INF, rng.standard_normal((2, 4, 40, 50))))
    clean = dense(c)
    x = getattr(c, name).copy()
    x[0, 1, 17, :] = value
    x[1, 0, 30, 1] = value
    c = replace(c, **{name: x})
    d = dense(c)
    state = None
    if extra == "state":
        state = Partial(np.zeros((2, 4, 40, 5)), np.full((2, 4, 40), -INF), np.zeros((2, 4, 40)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run_forward(c, state=state)
        grad = run_backward(c, d)
    touched = (d.weighted != clean.weighted).any(-1)
    same = np.isfinite(d.weighted).all(-1) & np.isfinite(d.total) & ~np.isnan(d.maximum)
    assert same.any()
    np.testing.assert_array_equal(np.isfinite(got.weighted).all(-1) & np.isfinite(got.total), same)
    assert touched.any() == (name != "dout")
    close(got.out[same], d.out[same], 1e-12)
    for field in ("dq", "dk", "dv"):
        want, have = getattr(d, field), getattr(grad, field)
        np.testing.assert_array_equal(np.isfinite(have).all(-1), np.isfinite(want).all(-1), err_msg=field)
        rows = np.isfinite(want).all(-1)
        close(have[rows], want[rows], 1e-10, field)


def test_a_poisoned_key_that_no_row_sees_changes_nothing():
    for name, value in (("k", np.nan), ("v", INF), ("k", INF)):
        c = case(band=Band(None, -3), S=50)
        x = getattr(c, name).copy()
        x[:, :, 45:] = value  # row 49 sees key 46 at most
        x[:, :, 45:47] = 0.5
        poisoned = replace(c, **{name: x})
        check(poisoned)


@pytest.mark.parametrize("sizes", [(3e19, 3e19), (1e10, 1e29), (1e29, 1e10)])
def test_products_that_overflow_stay_with_their_pair(sizes):
    c = case(dtype=np.float32, scale=1.0, band=Band(None, 0), S=40, T=40)
    q, k = c.q.copy(), c.k.copy()
    q[:, :, 20] = sizes[0]
    k[:, :, 30] = sizes[1]  # row 20 does not see key 30: their product is inf, all visible scores are finite
    k[:, :, :30] = 0
    k[:, :, 31:] *= 1e-3
    q[:, :, 30:] *= 0
    c = replace(c, q=q, k=k)
    d = dense(c)
    assert np.isfinite(d.weighted).all()
    got, grad = run_forward(c), run_backward(c, d)
    close(got.out, d.out, 1e-5)
    for name in ("dq", "dk", "dv"):
        have, want = getattr(grad, name), getattr(d, name)
        error = np.abs(have - want) / (1 + np.abs(want).max(-1, keepdims=True))
        assert error.max() < 1e-4, name


@pytest.mark.parametrize("shape", [None, (1, 1, 40, 50), (1, 4, 1, 50), (2, 1, 1, 1)])
@pytest.mark.parametrize("heads", [(4, 2), (1, 1)])
def test_any_number_of_threads_gives_the_same_bits(shape, heads, monkeypatch):
    genuine = backward.Backward._prepare_keys

    def slow_at_first(self, task, span, scratch):
        if span[0] == 0:
            time.sleep(0.01)  # later blocks of keys get ahead, and must wait
        return genuine(self, task, span, scratch)

    monkeypatch.setattr(backward.Backward, "_prepare_keys", slow_at_first)
    c = case(dtype=np.float32, H=heads[0], Hk=heads[1], band=Band(None, 5))
    if shape is not None:
        shape = tuple(min(n, m) for n, m in zip(shape, (2, heads[0], 40, 50), strict=True))
        c = replace(c, bias=np.random.default_rng(8).standard_normal(shape).astype(np.float32))
    d = dense(c)
    first = None
    for threads in (1, 2, 3, 3, 3):
        kernels = NumpyKernels(threads)
        p, g = run_forward(c, kernels), run_backward(c, d, kernels)
        results = [p.weighted, p.maximum, p.total, g.dq, g.dk, g.dv, *([] if g.dbias is None else [g.dbias])]
        first = first or results
        for have, want in zip(results, first, strict=True):
            np.testing.assert_array_equal(have, want)


@pytest.fixture
def two_blas_threads():
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        yield


def blas_threads():
    return [lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]


@pytest.mark.usefixtures("two_blas_threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_errors_come_out_and_blas_is_restored(threads, error, monkeypatch):
    before = blas_threads()
    assert max(before) > 1
    kernels, c = NumpyKernels(threads), case()
    genuine = forward.Forward.work

    def work(self, task, scratch, job):
        if task == 2:
            assert all(n == 1 for n in blas_threads())
            raise error("on purpose")
        genuine(self, task, scratch, job)

    monkeypatch.setattr(forward.Forward, "work", work)
    with pytest.raises(error, match="on purpose"):
        run_forward(c, kernels)
    assert blas_threads() == before
    monkeypatch.undo()
    check(c, kernels=kernels)
    assert blas_threads() == before


def test_an_error_ends_tasks_that_wait_for_their_turn(monkeypatch):
    c = case(B=1, H=1, Hk=1)
    genuine = backward.Backward._prepare_keys

    def fail(self, task, span, scratch):
        if span[0] == 0:
            time.sleep(0.2)  # until the next block waits for this one
            raise RuntimeError("on purpose")
        return genuine(self, task, span, scratch)

    monkeypatch.setattr(backward.Backward, "_prepare_keys", fail)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="on purpose"):
        run_backward(c, dense(c), NumpyKernels(3))
    assert time.monotonic() - start < 10


@pytest.mark.usefixtures("two_blas_threads")
def test_calls_from_several_threads_at_once():
    before = blas_threads()
    assert max(before) > 1
    kernels, errors = NumpyKernels(2), []

    def one(seed):
        try:
            for _ in range(5):
                check(case(seed, band=Band(None, 3)), kernels=kernels)
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=one, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors
    assert blas_threads() == before


@pytest.mark.usefixtures("two_blas_threads")
def test_overlapping_calls_hold_blas_until_the_last_one_ends(monkeypatch):
    before, c = blas_threads(), case()
    begun, ends = threading.Semaphore(0), {name: threading.Event() for name in ("first", "second")}

    def work(self, task, scratch, job):
        begun.release()
        ends[threading.current_thread().name].wait(20)

    monkeypatch.setattr(forward.Forward, "work", work)
    monkeypatch.setattr(forward.Forward, "_plan", lambda self: [None])
    callers = [threading.Thread(target=run_forward, args=(c, NumpyKernels(1)), name=name) for name in ends]
    for caller in callers:
        caller.start()
        assert begun.acquire(timeout=20)
    during = []
    for caller in callers:
        during.append(blas_threads())
        ends[caller.name].set()
        caller.join()
    assert during == [[1] * len(before)] * 2
    assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes():
    kernels, c = NumpyKernels(2), case()
    check(c, kernels=kernels)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check(c, kernels=kernels)
            used = set()
            forward.Forward.work = lambda *_: (used.add(threading.get_ident()), time.sleep(0.05))
            run_forward(c, kernels)
            code = 0 if len(used) == 2 else 2
        finally:
            os._exit(code)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    check(c, kernels=kernels)


def test_load_shares_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert [load(n).threads for n in (1, 2, 4, 100)] == [6, 3, 1, 1]
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert load().threads == 5
    for text, threads in (("3", 3), ("0", 5), ("x", 5), ("", 5), ("-2", 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert load().threads == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert load(sharers=8).threads == 3
    assert isinstance(load(), Kernels)
    with pytest.raises(ValueError, match="threads is 0"):
        NumpyKernels(0)


@pytest.mark.usefixtures("large_tiles")
def test_memory_does_not_grow_with_the_lengths():
    import tracemalloc

    peaks = []
    for length in (1024, 8192):
        c = case(B=1, H=1, Hk=1, S=length, T=length, D=4, E=4, dtype=np.float32)
        into, rows = zeros(c), np.ones((3, 1, 1, length), dtype=np.float32)
        kernels = NumpyKernels(2)
        tracemalloc.start()
        run_forward(c, kernels)
        kernels.backward(c.dout, c.q, c.k, c.v, *rows, score=c.score, tile=c.tile, into=into)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 16 * 2**20  # one array of scores would be 256 MiB
