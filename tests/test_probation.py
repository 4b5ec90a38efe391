"""Fused kernels with wrong statistics are refused: each fault that real ones had, planted in right ones."""

from dataclasses import replace

import numpy as np
import pytest

import ringcore
from ringcore import Gradients, Partial, UnsupportedError
from ringcore.partial import accumulation_dtype
from ringcore.tile import ReferenceKernels
from ringcore.values import namespace

REFERENCE = ReferenceKernels()


class Fused:
    """Right kernels of the fused kind: one tile's out and lse, and its own gradients."""

    def __init__(self):
        self.capabilities = ringcore.Capabilities("fused", fused=True, bands="triangles", bias_gradient=False)
        self.tries = 0

    def forward(self, q, k, v, **keywords):
        self.tries += 1
        part = REFERENCE.forward(q, k, v, **keywords)
        return self.spoil(Partial.from_lse(np.asarray(part.out).astype(q.dtype), part.lse))

    def spoil(self, part):
        return part

    def backward(self, dout, q, k, v, maximum, total, delta, *, out, lse, dlse, into, **keywords):
        assert delta is None
        assert into.dq is into.dk is into.dv is None
        np.testing.assert_allclose(lse, np.where(total > 0, maximum + np.log(np.where(total > 0, total, 1)), np.inf))
        xp, wide = namespace(q), accumulation_dtype(q)
        delta = xp.sum(xp.astype(out, wide) * xp.astype(dout, wide), axis=-1)
        delta = delta if dlse is None else delta - dlse
        sums = replace(
            into, **{f"d{name}": xp.zeros(x.shape, dtype=wide) for name, x in (("q", q), ("k", k), ("v", v))}
        )
        found = REFERENCE.backward(dout, q, k, v, maximum, total, delta, into=sums, **keywords)
        own = (x.astype(q.dtype) for x in (found.dq, found.dk, found.dv))
        return self.spoil_gradients(Gradients(*own, found.dbias))

    def spoil_gradients(self, gradients):
        return gradients


def arrays(dtype="float64"):
    rng = np.random.default_rng(3)
    return [rng.standard_normal((1, 2, 12, 8)).astype(dtype) for _ in range(3)]


def plus_inf(part):
    return replace(part, maximum=np.where(part.total > 0, part.maximum, np.inf))


FORWARD = {
    "a base of 2": lambda part: replace(part, maximum=part.maximum / np.log(2)),
    "rows without keys at 0": lambda part: replace(
        part, maximum=np.where(part.total > 0, part.maximum, 0.0), total=np.ones_like(part.total)
    ),
    "rows without keys at +inf": lambda part: replace(plus_inf(part), total=np.ones_like(part.total)),
    "heads in another order": lambda part: replace(part, maximum=part.maximum[:, ::-1]),
    "nothing written": lambda part: replace(part, weighted=np.full_like(part.weighted, np.nan)),
    "an lse of a half type": lambda part: replace(part, maximum=np.round(part.maximum * 16) / 16),
}
BACKWARD = {
    "no scale": lambda gained: replace(gained, dq=gained.dq * 3),
    "dk and dv exchanged": lambda gained: replace(gained, dk=gained.dv, dv=gained.dk),
    "dv unwritten": lambda gained: replace(gained, dv=np.full_like(gained.dv, np.nan)),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_right_fused_kernels_pass_and_are_exact(dtype, size):
    q, k, v = arrays(dtype)
    kernels = Fused()
    keywords = {"causal": True, "ring_size": size, "layout": "zigzag"}
    (out, lse), pullback = ringcore.ring_attention_vjp(q, k, v, kernels=kernels, **keywords)
    (due, due_lse), due_pullback = ringcore.ring_attention_vjp(q, k, v, kernels="reference", **keywords)
    allowed = {"float16": 4e-3, "float32": 5e-6, "float64": 1e-12}[dtype]
    dout = np.cos(np.arange(out.size)).reshape(out.shape).astype(dtype)
    dlse = np.sin(np.arange(lse.size)).reshape(lse.shape).astype(lse.dtype)
    pairs = [(out, due), (lse, due_lse), *zip(pullback(dout, dlse), due_pullback(dout, dlse), strict=True)]
    for came, expected in pairs:
        assert came.dtype == expected.dtype
        np.testing.assert_allclose(came.astype(float), expected.astype(float), rtol=0, atol=4 * allowed)


@pytest.mark.parametrize("fault", FORWARD)
def test_wrong_statistics_are_refused_before_use(fault):
    q, k, v = arrays("float32")
    kernels = Fused()
    kernels.spoil = FORWARD[fault]
    mask = np.ones((12, 12), bool)
    with pytest.raises(UnsupportedError, match=r"'fused' cannot do this call: their results on a small tile are wrong"):
        ringcore.ring_attention(q, k, v, mask=mask, kernels=kernels)
    assert kernels.tries == 1


@pytest.mark.parametrize("fault", BACKWARD)
def test_wrong_gradients_are_refused_before_use(fault):
    q, k, v = arrays("float32")
    kernels = Fused()
    kernels.spoil_gradients = BACKWARD[fault]
    ringcore.ring_attention(q, k, v, kernels=kernels)
    with pytest.raises(UnsupportedError, match="small tile are wrong"):
        ringcore.ring_attention_vjp(q, k, v, kernels=kernels)


def test_kernels_that_fail_are_refused_with_their_error():
    kernels = Fused()

    def fails(part):
        raise RuntimeError("no such instruction")

    kernels.spoil = fails
    with pytest.raises(UnsupportedError, match=r"failed on a small tile \(RuntimeError: no such instruction\)"):
        ringcore.ring_attention(*arrays(), kernels=kernels)


def test_kernels_are_tried_once_for_each_dtype_and_width():
    kernels = Fused()
    for _ in range(3):
        ringcore.ring_attention(*arrays(), kernels=kernels)
    assert kernels.tries == 1 + 3
    ringcore.ring_attention(*arrays("float32"), kernels=kernels)
    assert kernels.tries == 1 + 3 + 2


def test_kernels_are_not_tried_while_a_graph_is_captured():
    kernels = Fused()
    kernels.capturing = lambda: True
    ringcore.ring_attention(*arrays(), kernels=kernels)
    assert kernels.tries == 1


@pytest.mark.parametrize(("width", "values"), [(4, 1), (256, 256), (96, 5), (8, 64), (1, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_right_kernels_pass_at_every_width(dtype, width, values):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 2, 5, n)).astype(dtype) for n in (width, width, values))
    ringcore.ring_attention_vjp(q, k, v, kernels=Fused())


def test_kernels_that_cannot_be_remembered_are_tried_each_time():
    class Slotted:
        __slots__ = ("capabilities", "forward")

        def __init__(self, kernels):
            self.capabilities, self.forward = kernels.capabilities, kernels.forward

        def backward(self):
            raise NotImplementedError

    kernels = Fused()
    for _ in range(2):
        ringcore.ring_attention(*arrays(), kernels=Slotted(kernels))
    assert kernels.tries == 2 * 2


def test_a_gradient_of_a_bias_is_given_by_kernels_that_say_so_alone():
    with pytest.raises(UnsupportedError, match="'fused' cannot do this call: they have no bias gradient"):
        ringcore.ring_attention_vjp(*arrays(), bias=np.zeros((12, 12)), wrt=("q", "bias"), kernels=Fused())


def with_bias_gradient():
    kernels = Fused()
    kernels.capabilities = replace(kernels.capabilities, bias_gradient=True)
    return kernels


@pytest.mark.parametrize("shape", [(2, 12, 12), (1, 12), (12, 1)])
@pytest.mark.parametrize("size", [1, 3])
def test_the_gradient_of_a_bias_is_summed_over_the_tiles_of_fused_kernels(size, shape):
    bias = np.random.default_rng(5).standard_normal(shape)
    mask = np.random.default_rng(6).random((12, 12)) < 0.7
    keywords = {"bias": bias, "mask": mask, "wrt": ("bias", "k"), "causal": True, "ring_size": size, "layout": "zigzag"}
    (out, _), pullback = ringcore.ring_attention_vjp(*arrays(), kernels=with_bias_gradient(), **keywords)
    _, due = ringcore.ring_attention_vjp(*arrays(), kernels="reference", **keywords)
    for came, expected in zip(pullback(np.cos(out)), due(np.cos(out)), strict=True):
        np.testing.assert_allclose(came, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (1, 12)])
def test_a_wrong_gradient_of_a_bias_is_refused_before_use(shape):
    kernels = with_bias_gradient()
    kernels.spoil_gradients = lambda gained: replace(gained, dbias=gained.dbias * 2)
    with pytest.raises(UnsupportedError, match="dbias is off by"):
        ringcore.ring_attention_vjp(*arrays(), bias=np.zeros(shape), wrt=("q", "bias"), kernels=kernels)


def test_a_swallowed_bias_is_found_before_use():
    kernels = Fused()
    kernels.forward = lambda *given, bias=None, **keywords: Fused.forward(kernels, *given, **keywords)
    with pytest.raises(UnsupportedError, match="out is off by"):
        ringcore.ring_attention(*arrays(), bias=np.zeros((12, 12)), kernels=kernels)
