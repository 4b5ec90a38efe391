"""Calls over a ring of CuPy's arrays, and what they must give."""

import cupy
import numpy as np

import ringcore


def whole(length=24, seed=0, dtype="float64"):
    """q, k, v and dout of all ranks together, with heads of 4 and 2."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, heads, length, 4)).astype(dtype) for heads in (4, 2, 2, 4)]


def shards(arrays, ring, layout):
    return [cupy.asarray(ringcore.shard(x, layout, ring.rank, ring.size)) for x in arrays]


def run(ring, arrays, layout="zigzag", where=None, **keywords):
    """out, dq, dk, dv of this rank; ``where`` is what is given as ring, if it is not ``ring`` itself."""
    q, k, v, dout = shards(arrays, ring, layout)
    keywords = {"causal": True, "kernels": "reference"} | keywords
    (out, _), pullback = ringcore.ring_attention_vjp(
        q, k, v, wrt=("q", "k", "v"), ring=ring if where is None else where, layout=layout, **keywords
    )
    return [out, *pullback(dout, None)]


def check(ring, arrays=None, layout="zigzag", where=None):
    """The call gives what the ring in one process gives."""
    arrays = whole() if arrays is None else arrays
    (out, _), pullback = ringcore.ring_attention_vjp(*arrays[:3], wrt=("q", "k", "v"), causal=True, kernels="reference")
    due = [out, *pullback(arrays[3], None)]
    for x, y in zip(run(ring, arrays, layout, where), due, strict=True):
        np.testing.assert_allclose(cupy.asnumpy(x), ringcore.shard(y, layout, ring.rank, ring.size), atol=1e-12)
