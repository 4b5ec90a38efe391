"""Seeded problems, their whole-array results, and each rank's shards."""

from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

import ringcore


@dataclass
class Problem:
    """Whole arrays, the ring's size and layout, and how the call is made."""

    size: int
    layout: Any
    keywords: dict
    q: Any
    k: Any
    v: Any
    dout: Any

    def shard(self, x, rank):
        return ringcore.shard(x, self.layout, rank, self.size, axis=2)

    def shards(self, rank):
        return tuple(self.shard(x, rank) for x in (self.q, self.k, self.v))

    def expected(self):
        """(out, lse, dq, dk, dv) of the whole arrays, by a ring in this process."""
        (out, lse), pullback = ringcore.ring_attention_vjp(
            self.q, self.k, self.v, ring_size=self.size, layout=self.layout, **self.keywords
        )
        return (out, lse, *pullback(self.dout))

    def computed(self, ring, rank):
        """(out, lse, dq, dk, dv) of this rank's shards."""
        (out, lse), pullback = ringcore.ring_attention_vjp(
            *self.shards(rank), ring=ring, layout=self.layout, **self.keywords
        )
        return (out, lse, *pullback(self.shard(self.dout, rank)))

    def check(self, ring, rank):
        """Compare this rank's part of every result, bit for bit."""
        results = self.computed(ring, rank)
        for name, whole, mine in zip(("out", "lse", "dq", "dk", "dv"), self.expected(), results, strict=True):
            same(name, self.shard(whole, rank), mine)
        return results


def problem(size, layout="contiguous", length=53, dtype="float64", convert=None, heads=(4, 2), width=8, **keywords):
    random = np.random.default_rng(7)

    def draw(count):
        x = random.standard_normal((2, count, length, width))
        if dtype == "bfloat16" and convert is None:
            import ml_dtypes

            return x.astype(ml_dtypes.bfloat16)
        return x.astype(dtype) if convert is None else convert(x)

    q, k, v, dout = (draw(count) for count in (heads[0], heads[1], heads[1], heads[0]))
    return Problem(size, layout, keywords, q, k, v, dout)


def same(name, due, came):
    """Equal in library, dtype, shape and every bit."""
    assert type(due) is type(came), name
    assert due.dtype == came.dtype, name
    if array_api_compat.is_torch_array(due):
        due, came = due.double().numpy(), came.double().numpy()
    np.testing.assert_array_equal(came.astype("float64"), due.astype("float64"), err_msg=name)
