"""A cache that is dealt to the ranks of a ring, and what decoding over it must give: for worlds of any transport."""

import numpy as np

import ringcore

BATCH, HEADS, KEY_HEADS, ROOM, WIDTH = 2, 4, 2, 22, 6
CALLS = {
    "full": {},
    "growing": {"key_lengths": [17, 4], "window": (6, 0)},
    "few keys": {"key_lengths": [13, 12], "causal": False},
    "sinks": {"sinks": np.linspace(-1.0, 2.0, HEADS), "softcap": 2.0, "key_lengths": [9, 22]},
}


def problem(rows, dtype="float64"):
    """q, k and v, equal on every rank."""
    rng = np.random.default_rng(rows)
    sizes = (HEADS, rows), (KEY_HEADS, ROOM), (KEY_HEADS, ROOM)
    return [rng.standard_normal((BATCH, *size, WIDTH)).astype(dtype) for size in sizes]


def check(ring, layout, name, rows, make=lambda x: x, back=lambda x: x):
    """This rank's call gives what one process does with the whole cache; returns out's bytes."""
    q, k, v = problem(rows)
    keywords = dict(CALLS[name])
    due, due_lse = ringcore.decode_attention(q, k, v, kernels="reference", **keywords)
    if "sinks" in keywords:
        keywords["sinks"] = make(keywords["sinks"])
    mine = (make(np.ascontiguousarray(ringcore.shard(x, layout, ring.rank, ring.size))) for x in (k, v))
    mine = tuple(mine)
    out, lse = ringcore.decode_attention(make(q), *mine, ring=ring, layout=layout, **keywords)
    dealt = make(np.ascontiguousarray(ringcore.shard(q, "striped", ring.rank, ring.size)))
    of_rows = ringcore.decode_attention(dealt, *mine, ring=ring, layout=layout, q_layout="striped", **keywords)
    for x, whole in zip(of_rows, (due, due_lse), strict=True):
        np.testing.assert_allclose(back(x), ringcore.shard(whole, "striped", ring.rank, ring.size), atol=1e-12)
    np.testing.assert_allclose(back(out), due, atol=1e-12)
    np.testing.assert_allclose(back(lse), due_lse, atol=1e-12)
    return back(out).tobytes()
