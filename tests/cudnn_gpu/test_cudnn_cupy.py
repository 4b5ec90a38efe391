"""cuDNN's kernels on CuPy arrays against dense attention in NumPy's float64."""

from __future__ import annotations

import cupy
import ml_dtypes
import numpy as np
import pytest

import ringcore
from ringcore.discovery import choose_kernels

pytestmark = pytest.mark.timeout(300)
KERNELS = "cupy.cuda.cudnn"
TOLERANCE = {"bfloat16": (8e-3, 3e-2), "float16": (1e-3, 4e-3)}  # out, gradients
BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 4, 2, 301, 64


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def draw(name):
    rng = np.random.default_rng(5)
    heads = HEADS, KEY_HEADS, KEY_HEADS, HEADS
    return [rng.standard_normal((BATCH, count, LENGTH, WIDTH)).astype(dtype_of(name)) for count in heads]


def dense(q, k, v, dout, *, causal=False, mask=True):
    """out, lse, dq, dk and dv."""
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    k, v = (np.repeat(x, HEADS // KEY_HEADS, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) * WIDTH**-0.5
    seen = np.broadcast_to(mask, scores.shape)
    if causal:
        seen = seen & np.tri(LENGTH, dtype=bool)
    scores = np.where(seen, scores, -np.inf)
    top = np.where(seen.any(-1), scores.max(-1), 0.0)[..., None]
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    weights = weights / np.where(total > 0, total, 1.0)
    out = weights @ v
    dscores = weights * (dout @ v.swapaxes(2, 3) - (dout * out).sum(-1, keepdims=True)) * WIDTH**-0.5
    dk, dv = dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dout
    dk, dv = (x.reshape(BATCH, KEY_HEADS, -1, LENGTH, WIDTH).sum(2) for x in (dk, dv))
    return out, lse, dscores @ k, dk, dv


def hidden(*shape):
    return np.random.default_rng(6).random(shape) < 0.4


TERMS = {
    "plain": {},
    "causal": {"causal": True},
    "mask": {"mask": ~hidden(BATCH, 1, LENGTH, LENGTH) & (np.arange(LENGTH) % 7 > 0)[:, None]},
    "mask, causal": {"mask": ~hidden(1, HEADS, LENGTH, LENGTH), "causal": True},
    "mask of keys": {"mask": ~hidden(BATCH, 1, 1, LENGTH)},
}


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize(("size", "layout"), [(1, "contiguous"), (2, "zigzag"), (3, "striped")])
@pytest.mark.parametrize("term", TERMS)
def test_out_lse_and_gradients(term, size, layout, name):
    arrays = draw(name)
    keywords = TERMS[term]
    given = {key: cupy.asarray(x) if isinstance(x, np.ndarray) else x for key, x in keywords.items()}
    q, k, v, dout = map(cupy.asarray, arrays)
    poison = [cupy.full(1 << bits, np.nan, dtype=np.float32) for bits in range(8, 22) for _ in range(2)]
    del poison
    (out, lse), pullback = ringcore.ring_attention_vjp(
        q, k, v, ring_size=size, layout=layout, kernels=KERNELS, **given
    )  # fmt: skip
    came = [cupy.asnumpy(x) for x in (out, lse, *pullback(dout))]
    due = dense(*arrays, **keywords)
    seen = np.isfinite(due[1])
    assert (came[1][~seen] == -np.inf).all()
    assert np.abs(came[1][seen] - due[1][seen]).max() < 1e-4
    allowed = TOLERANCE[name]
    for place, (mine, expected) in enumerate(zip(came, due, strict=True)):
        if place != 1:
            error = np.abs(mine.astype(np.float64) - expected).max() / max(1.0, np.abs(expected).max())
            assert error < allowed[place > 1]


def test_they_are_taken_without_being_asked_for():
    x = cupy.zeros((1, 1, 8, 64), dtype=np.float16)
    assert choose_kernels(None, x, x, frozenset({"mask", "gradient"}))[0].capabilities.name == KERNELS
    assert choose_kernels(None, x, x, frozenset({"bias"}))[0].capabilities.name == "cupy.cuda.tiled"
    x = x.astype(np.float32)
    assert choose_kernels(None, x, x, frozenset())[0].capabilities.name == "cupy.cuda.tiled"


def test_a_bias_is_not_for_them():
    q, k, v, _ = map(cupy.asarray, draw("float16"))
    with pytest.raises(ringcore.UnsupportedError, match="they have no bias"):
        ringcore.ring_attention(q, k, v, bias=cupy.zeros((LENGTH, LENGTH), dtype=q.dtype), kernels=KERNELS)


def test_one_number_is_the_total_of_all_tiles():
    from ringcore_cudnn.cupy_arrays import CupyArrays

    arrays, x = CupyArrays(), cupy.zeros((2, 3, 4), dtype=np.float16)
    ones = arrays.ones(x)
    assert ones is arrays.ones(x)
    assert arrays.ones(x[:1]).data.ptr == ones.data.ptr
    assert (ones.shape, ones.dtype, ones.strides) == (x.shape, np.float32, (0, 0, 0))
    assert bool((ones == 1).all())
    alone = arrays.ones(x[:1, :1, :1])
    assert alone.data.ptr != ones.data.ptr
    assert float(alone[0, 0, 0]) == 1.0


def test_work_is_queued_on_the_current_stream():
    q, k, v, _ = map(cupy.asarray, draw("float16"))
    due = ringcore.ring_attention(q, k, v, kernels=KERNELS, causal=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        out = ringcore.ring_attention(q, k, v, kernels=KERNELS, causal=True)
    stream.synchronize()
    assert bool((out == due).all())
