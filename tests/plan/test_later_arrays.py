"""The plans of later features, computed by the work that ring attention does today: forward and backward on arrays.

The other files here prove plans with counts alone; this one shows that real blocks, and gradients that go home in
parts, take the same way.
"""

import array_api_strict
import numpy as np
import pytest
from counting import run_rendezvous
from deals import deals, sees, visibility

import ringcore
from ringcore import Partial
from ringcore.backward_work import BackwardWork
from ringcore.forward_work import ForwardWork
from ringcore.ring import ring
from ringcore.routes import both_ways_plans, double_ring_plans
from ringcore.tile import ReferenceKernels
from ringcore.values import Score

BATCH, HEADS, KEY_HEADS, LENGTH = 2, 4, 2, 21
SCALE = 0.4


def plans_for(feature, dealt):
    """The plans of a feature, and how often each pair counts [B, H, S, N]."""
    seen = visibility(keys=LENGTH, causal=True, heads=HEADS, key_heads=KEY_HEADS)
    count = np.indices((BATCH, HEADS, LENGTH, LENGTH)).reshape(4, -1).T
    shape = (BATCH, HEADS, LENGTH, LENGTH)

    def counted(visible, times=lambda b, h, i, j: 1):
        return np.array([visible(*x) * times(*x) for x in count.tolist()], float).reshape(shape)

    return {
        "double rings": lambda: (double_ring_plans(*dealt, seen, 2), counted(sees(seen))),
        "both ways": lambda: (both_ways_plans(*dealt, seen), counted(sees(seen))),
    }[feature]()


def dense(q, k, v, dout, times):
    """out, lse, dq, dk and dv, where a pair counts ``times`` times."""
    group = HEADS // KEY_HEADS
    k_full, v_full = (np.repeat(x, group, axis=1) for x in (k, v))
    power = times * np.exp(q @ np.swapaxes(k_full, -1, -2) * SCALE)
    total = power.sum(-1, keepdims=True)
    weights = power / np.where(total > 0, total, 1)
    dweights = dout @ np.swapaxes(v_full, -1, -2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * SCALE

    def folded(x):
        return x.reshape(BATCH, KEY_HEADS, group, *x.shape[2:]).sum(2)

    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0])
    dk, dv = folded(np.swapaxes(dscores, -1, -2) @ q), folded(np.swapaxes(weights, -1, -2) @ dout)
    return weights @ v_full, lse, dscores @ k_full, dk, dv


def rings(plans, dealt, arrays):
    """The same five results, from every rank's shards."""
    q_layout, k_layout = dealt
    ranks = range(len(plans))
    q, k, v, dout = (
        [ringcore.shard(x, layout, rank, len(plans)) for rank in ranks]
        for x, layout in zip(arrays, (q_layout, k_layout, k_layout, q_layout), strict=True)
    )
    forward = [
        ForwardWork(*parts, None, None, score=Score(SCALE), kernels=ReferenceKernels(), lengths=k_layout.lengths)
        for parts in zip(q, k, v, strict=True)
    ]
    run_rendezvous([ring(plan, work) for plan, work in zip(plans, forward, strict=True)])
    partials = [Partial(*work.finish(q[0].dtype)) for work in forward]
    backward = []
    for work, part, gradient in zip(forward, partials, dout, strict=True):
        rows = part.weighted, part.weighted, part.maximum, part.total
        backward.append(BackwardWork(work, gradient, None, *rows, wanted=frozenset("qkv")))
    home = run_rendezvous([ring(plan, work) for plan, work in zip(plans, backward, strict=True)])
    by_row = [part.weighted for part in partials], [part.lse for part in partials], [work.dq for work in backward]
    by_key = zip(*home, strict=True)
    return [
        *(ringcore.unshard(parts, q_layout) for parts in by_row),
        *(ringcore.unshard(parts, k_layout) for parts in by_key),
    ]


@pytest.mark.parametrize("name", ["contiguous", "mixed"])
@pytest.mark.parametrize("feature", ["double rings", "both ways"])
def test_later_plans_are_exact_on_arrays(feature, name):
    dealt = deals(name, LENGTH, LENGTH, 4)
    plans, times = plans_for(feature, dealt)
    random = np.random.default_rng(3)
    heads = HEADS, KEY_HEADS, KEY_HEADS, HEADS
    widths = 5, 5, 3, 3
    arrays = [random.standard_normal((BATCH, h, LENGTH, w)) for h, w in zip(heads, widths, strict=True)]
    due = dense(*arrays, times)
    device = array_api_strict.Device("device1")
    strict = [array_api_strict.asarray(x, device=device) for x in arrays]
    for made in (arrays, strict):
        for result, expected in zip(rings(plans, dealt, made), due, strict=True):
            if made is strict:
                result = result.to_device(array_api_strict.Device("CPU_DEVICE"))
            np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-12, atol=1e-12)
    for x, kept in zip(arrays, strict, strict=True):
        assert (x == np.asarray(kept.to_device(array_api_strict.Device("CPU_DEVICE")))).all()
