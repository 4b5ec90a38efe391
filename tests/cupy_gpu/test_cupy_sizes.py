"""CuPy's kernels where only a GPU shows what is wrong: sizes at which threads overtake each other, streams, memory.

Over the stand-in for CuPy the same tests run at small sizes.
"""

from __future__ import annotations

import statistics
import time

import cupy
import ml_dtypes
import numpy as np
import pytest

import ringcore
from ringcore import Partial
from ringcore_cupy import Tiled, partials

pytestmark = pytest.mark.timeout(300)
ON_CPU = cupy.__version__.endswith("stand-in")
KINDS = {name: np.dtype(name) for name in ("float64", "float32", "float16")}
KINDS["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
HEADS, ROWS, WIDTH = (2, 37, 8) if ON_CPU else (16, 9001, 128)
LENGTH = 60 if ON_CPU else 2100
CALLS = 40 if ON_CPU else 1000
OUT = {"float64": 1e-12, "float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
GRADIENT = {"float64": 1e-10, "float32": 2e-5, "float16": 8e-3, "bfloat16": 6e-2}


def partial(seed, kind, finished=False):
    rng = np.random.default_rng(seed)
    wide = np.dtype(np.float64 if kind == np.float64 else np.float32)
    maximum = rng.standard_normal((1, HEADS, ROWS)).astype(wide) * 20
    maximum[rng.random(maximum.shape) < 0.2] = -np.inf
    weighted = rng.standard_normal((1, HEADS, ROWS, WIDTH), dtype=np.float32).astype(kind)
    total = np.ones_like(maximum) if finished else rng.random(maximum.shape).astype(wide) + 0.5
    return Partial(weighted, maximum, total)


def on_gpu(part, finished=False):
    total = (
        cupy.broadcast_to(cupy.ones((), part.total.dtype), part.total.shape) if finished else cupy.asarray(part.total)
    )
    return Partial(cupy.asarray(part.weighted), cupy.asarray(part.maximum), total)


def merged(first, second):
    wide = [Partial(*(x.astype(np.float64) for x in (p.weighted, p.maximum, p.total))) for p in (first, second)]
    return ringcore.merge(*wide)


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind):
    wide = KINDS["float64" if kind == "float64" else "float32"]
    first, second = partial(1, wide), partial(2, KINDS[kind])
    due, close = merged(first, second), 1e-13 if kind == "float64" else 3e-6
    every = slice(None), slice(None), slice(None), ...
    for _ in range(5):  # a race need not show the first time
        state = partials.merge_rows(on_gpu(first), every, on_gpu(second))
        for name in ("weighted", "maximum", "total"):
            seen = due.seen
            came = cupy.asnumpy(getattr(state, name))[seen]
            np.testing.assert_allclose(came, getattr(due, name)[seen], rtol=close, atol=close)
        out, maximum, total = partials.finished(state, KINDS[kind])
        np.testing.assert_allclose(cupy.asnumpy(out).astype(np.float64), due.out, rtol=OUT[kind], atol=OUT[kind])
        lse = cupy.asnumpy(partials.finished_lse(maximum, total, -np.inf))
        np.testing.assert_allclose(lse, due.lse, rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_finishing_in_place(kind):
    first, second = partial(3, KINDS[kind], finished=True), partial(4, KINDS[kind], finished=True)
    due = merged(first, second)
    every = slice(None), slice(None), slice(None), ...
    for _ in range(5):
        state = on_gpu(first, finished=True)
        out, maximum, _ = partials.finished(state, KINDS[kind], (every, on_gpu(second, finished=True)))
        assert out is state.weighted
        came = cupy.asnumpy(out).astype(np.float64)[due.seen]
        np.testing.assert_allclose(came, due.out[due.seen], rtol=OUT[kind], atol=OUT[kind])
        np.testing.assert_allclose(cupy.asnumpy(maximum)[due.seen], due.lse[due.seen], rtol=3e-6, atol=3e-6)


def dense(q, k, v, dout, bias, mask, softcap):
    """out, lse and gradients through whole float64 matrices on the device; causal."""
    q, k, v, dout, bias = (x.astype(np.float64) for x in (q, k, v, dout, bias))
    group = q.shape[1] // k.shape[1]
    k, v = (cupy.repeat(x, group, axis=1) for x in (k, v))
    inner = cupy.tanh(q @ k.swapaxes(2, 3) * (q.shape[3] ** -0.5 / softcap))
    seen = (cupy.arange(k.shape[2])[None, :] <= cupy.arange(q.shape[2])[:, None]) & mask
    scores = cupy.where(seen, inner * softcap + bias, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = cupy.where(top == -np.inf, 0.0, top)
    weights = cupy.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    lse = (top + cupy.log(cupy.where(total > 0, total, 1.0)))[..., 0]
    weights = weights / cupy.where(total > 0, total, 1.0)
    out = weights @ v
    dscores = weights * (dout @ v.swapaxes(2, 3) - (dout * out).sum(-1, keepdims=True))
    draw = dscores * (1 - inner * inner) * q.shape[3] ** -0.5
    folded = (q.shape[0], k.shape[1] // group, group, k.shape[2], -1)
    dk = (draw.swapaxes(2, 3) @ q).reshape(folded).sum(2)
    dv = (weights.swapaxes(2, 3) @ dout).reshape(folded).sum(2)
    return out, cupy.where(total[..., 0] > 0, lse, -np.inf), draw @ k, dk, dv, dscores.sum((0, 2), keepdims=True)


def inputs(kind, batch=2, heads=8, key_heads=2, width=40, values=72):
    rng = np.random.default_rng(5)
    shapes = (heads, width), (key_heads, width), (key_heads, values), (heads, values)
    arrays = [
        cupy.asarray(rng.standard_normal((batch, n, LENGTH, w), dtype=np.float32).astype(KINDS[kind]))
        for n, w in shapes
    ]
    bias = cupy.asarray(rng.standard_normal((1, heads, 1, LENGTH), dtype=np.float32).astype(KINDS[kind]))
    return *arrays, bias, cupy.asarray(rng.random((batch, 1, LENGTH, LENGTH)) < 0.7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [1 << 15, 32 << 20])
@pytest.mark.parametrize("size", [1, 2])
def test_tiles(size, room, kind):
    q, k, v, dout, bias, mask = inputs(kind)
    due = dense(q, k, v, dout, bias, mask, 5.0)
    kernels = Tiled(room=room if ON_CPU else room << 4)
    found = []
    for _ in range(2):
        (out, lse), pullback = ringcore.ring_attention_vjp(
            q, k, v, wrt=("q", "k", "v", "bias"), kernels=kernels, ring_size=size, layout="zigzag", causal=True,
            bias=bias, mask=mask, softcap=5.0,
        )  # fmt: skip
        found.append([cupy.asnumpy(x) for x in (out, lse, *pullback(dout))])
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first.view(np.uint8), second.view(np.uint8))  # every run gives the same bits
    for place, (came, expected) in enumerate(zip(found[0], map(cupy.asnumpy, due), strict=True)):
        finite = np.isfinite(expected)
        assert (came[~finite] == expected[~finite]).all()
        error = np.abs(came.astype(np.float64)[finite] - expected[finite]).max() / max(
            1.0, np.abs(expected[finite]).max()
        )
        assert error < (OUT if place < 2 else GRADIENT)[kind], place


def test_work_is_queued_on_the_current_stream():
    q, k, v, *_ = inputs("float32")
    due = ringcore.ring_attention(q, k, v, kernels="cupy.cuda.tiled", causal=True, ring_size=2)
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        out = ringcore.ring_attention(q, k, v, kernels="cupy.cuda.tiled", causal=True, ring_size=2)
    stream.synchronize()
    assert float(abs(out - due).max()) < 1e-5


def test_the_pool_is_flat():
    q, k, v, dout, *_ = (x[:, :, :50] for x in inputs("float32"))
    pool, seen = cupy.get_default_memory_pool(), []
    for call in range(CALLS):
        (out, lse), pullback = ringcore.ring_attention_vjp(q, k, v, kernels="cupy.cuda.tiled", causal=True, ring_size=2)
        gradients = pullback(dout)
        del out, lse, pullback, gradients
        if call in (20, CALLS - 1):
            seen.append((pool.used_bytes(), pool.total_bytes()))
    assert seen[0] == seen[1]


@pytest.mark.skipif(ON_CPU, reason="the stand-in computes as it is called")
def test_a_merge_takes_the_host_less_than_60_microseconds():
    first, second = (on_gpu(partial(seed, KINDS["float32"])) for seed in (6, 7))
    every = slice(None), slice(None), slice(0, 64), ...
    part = Partial(*(x[every] for x in (second.weighted, second.maximum, second.total)))
    spent = []
    for _ in range(300):
        start = time.perf_counter()
        partials.merge_rows(first, every, part)
        spent.append(time.perf_counter() - start)
    assert statistics.median(spent) < 60e-6
