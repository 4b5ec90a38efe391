"""Each fused kernel for GPUs against dense attention in float64: its bands, its statistics, its gradients."""

from __future__ import annotations

import pytest
import torch
from against_dense import check, draw

import ringcore
from ringcore import Partial, UnsupportedError

pytestmark = pytest.mark.timeout(300)
FRONTEND = "torch.cuda.cudnn_frontend"
TRITON = "torch.cuda.triton"
KERNELS = ("torch.cuda.flash4", "torch.cuda.cudnn", FRONTEND, "torch.cuda.flash2", TRITON)
SHAPES = {
    "plain": (2, 4, 4, 256, 256, 64, 64),
    "grouped, odd lengths": (2, 6, 2, 333, 333, 128, 128),
    "one row": (1, 2, 2, 1, 77, 64, 64),
    "tall": (1, 4, 1, 500, 200, 32, 32),
    "wide": (1, 4, 1, 130, 700, 96, 96),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_shapes(name, shape, causal, dtype):
    check(name, dtype, SHAPES[shape], causal=causal, dlse_too=shape != "plain")


@pytest.mark.parametrize("memory", ["bhsd", "bshd"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", KERNELS)
def test_rings(name, size, layout, memory):
    check(name, torch.bfloat16, (2, 4, 2, 301, 301, 64, 64), size, layout, memory, causal=True)


@pytest.mark.parametrize("keywords", [
    {"window": (50, 20)}, {"window": (40, None)}, {"window": (None, 30)}, {"window": (0, 0)}, {"causal": True, "window": (64, 0)},
    {"causal": True, "offset": 40}, {"causal": True, "offset": -30}, {"window": (10, 5), "offset": 100},
    {"key_lengths": (100, 0)}, {"causal": True, "key_lengths": (300, 17)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [1, 3])
def test_what_a_query_sees(name, keywords, size):
    def attend():
        check(name, torch.bfloat16, (2, 2, 1, 310, 310, 64, 64), size, "zigzag", **keywords)

    if name == "torch.cuda.cudnn" and keywords.get("window", (None,))[0] is not None:
        with pytest.raises(UnsupportedError, match="they have no window"):
            attend()
    else:
        attend()


@pytest.mark.parametrize("keys", [64, 100, 128, 192])
@pytest.mark.parametrize("rows", [1, 64, 100])
@pytest.mark.parametrize(("name", "masked"), [(FRONTEND, True), *((name, False) for name in KERNELS)])
def test_very_negative_scores_have_gradients(name, masked, rows, keys):
    # Where a kernel forgets to hide what is past the last key, exp(0 - lse) overflows.
    q, k, v = draw(torch.bfloat16, 1, 2, 2, rows, keys, 64, 64)
    q, k = q * 0.1 + 3.87, k * 0.1 - 3.87  # every score is near -120
    mask = torch.ones((rows, keys), dtype=torch.bool, device="cuda") if masked else None
    (_, lse), pullback = ringcore.ring_attention_vjp(q, k, v, kernels=name, mask=mask)
    assert (lse < -100).all()
    _, due = ringcore.ring_attention_vjp(*(x.double() for x in (q, k, v)), kernels="reference")
    dout = torch.ones_like(q)
    for mine, expected in zip(pullback(dout), due(dout.double()), strict=True):
        torch.testing.assert_close(mine.double(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "keywords", [{"causal": True}, {}, {"causal": True, "window": (20, 0)}, {"window": (9, 30)}], ids=str
)
@pytest.mark.parametrize(("batch", "size", "layout"), [(1, 1, "contiguous"), (2, 3, "zigzag"), (1, 2, "balanced")])
@pytest.mark.parametrize("name", KERNELS)
def test_documents(name, batch, size, layout, keywords):
    ends = [0, 1, 60, 64, 192, 193, 310]
    q, k, v = draw(torch.bfloat16, batch, 4, 2, ends[-1], ends[-1], 64, 64)
    if name == "torch.cuda.cudnn" and "window" in keywords:
        pytest.skip("it has no window")
    dout = torch.randn_like(q)
    if layout == "balanced":
        layout = ringcore.balanced(ends[-1], size, cu_seqlens=ends, **keywords)
    (out, lse), pullback = ringcore.ring_attention_vjp(
        q, k, v, kernels=name, ring_size=size, layout=layout, cu_seqlens=ends, **keywords
    )
    wide = [x.double() for x in (q, k, v)]
    (due, due_lse), of_due = ringcore.ring_attention_vjp(*wide, kernels="reference", cu_seqlens=ends, **keywords)
    torch.testing.assert_close(out.double(), due, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), due_lse, atol=2e-5, rtol=2e-5)
    for mine, expected in zip(pullback(dout), of_due(dout.double()), strict=True):
        assert float((mine.double() - expected).abs().max() / expected.abs().max()) < 3e-2


def test_documents_are_few_launches_for_flash4(monkeypatch):
    kernels = pytest.importorskip("ringcore_flash4.kernels")
    q, k, v = draw(torch.bfloat16, 1, 4, 2, 640, 640, 64, 64)
    keywords = {"kernels": "torch.cuda.flash4", "cu_seqlens": list(range(0, 641, 16)), "causal": True}
    ringcore.ring_attention(q, k, v, **keywords)  # tried on small tiles first
    launched = []
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, own=own, **kw: launched.append(own) or own(*a, **kw))
    _, pullback = ringcore.ring_attention_vjp(q, k, v, **keywords)
    assert len(launched) == 1
    pullback(torch.ones_like(q))
    assert len(launched) == 2


def test_softcap_and_another_width_of_values():
    check("torch.cuda.flash4", torch.bfloat16, (1, 4, 2, 200, 200, 64, 64), 2, "zigzag", causal=True, softcap=5.0)
    check("torch.cuda.flash4", torch.bfloat16, (1, 4, 4, 200, 200, 64, 128), 2, "zigzag", causal=True)
    check("torch.cuda.flash4", torch.bfloat16, (1, 4, 4, 200, 200, 192, 128), causal=True, dlse_too=False)


def test_gradients_of_grouped_heads_with_another_width_of_values_are_not_for_flash4():
    with pytest.raises(UnsupportedError, match="failed on a small tile"):
        check("torch.cuda.flash4", torch.bfloat16, (1, 4, 2, 200, 200, 64, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 64, 256])
@pytest.mark.parametrize("length", [37, 9001])  # the longer one fills the GPU, where threads overtake each other
def test_merging_in_one_pass_is_the_merge(dtype, width, length):
    from ringcore_torch.partials import finished, finished_lse, merge_rows

    generator = torch.Generator("cuda").manual_seed(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def partial(kind):
        weighted = torch.randn((2, 3, length, width), generator=generator, device="cuda", dtype=torch.float64).to(kind)
        maximum = torch.randn((2, 3, length), generator=generator, device="cuda", dtype=wide) * 200
        total = torch.rand((2, 3, length), generator=generator, device="cuda", dtype=wide) + 0.5
        empty = torch.rand((2, 3, length), generator=generator, device="cuda") < 0.2
        weighted[empty] = 0.0
        return Partial(weighted, maximum.masked_fill(empty, -torch.inf), total.masked_fill(empty, 0.0))

    first, second = partial(wide), partial(dtype)
    rows = slice(None), slice(None), slice(5, length - 7)
    part = Partial(
        *(x[rows].transpose(0, 1).contiguous().transpose(0, 1) for x in (second.weighted, second.maximum, second.total))
    )
    due = ringcore.merge(first, second)
    state = merge_rows(Partial(first.weighted.clone(), first.maximum.clone(), first.total.clone()), rows, part)
    close = 1e-12 if wide == torch.float64 else 2e-6
    for name in ("weighted", "maximum", "total"):
        x = getattr(state, name)
        torch.testing.assert_close(x[rows], getattr(due, name)[rows], atol=close, rtol=close)
        outside = torch.ones(length, dtype=torch.bool, device="cuda")
        outside[5 : length - 7] = False
        assert torch.equal(x[:, :, outside], getattr(first, name)[:, :, outside])
    torch.testing.assert_close(finished_lse(state.maximum, state.total, -torch.inf), state.lse, atol=close, rtol=close)
    out = state.out
    torch.testing.assert_close(finished(state, wide)[0], out, atol=close, rtol=close)


@pytest.mark.parametrize("length", [40, 9001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_two_finished_partials_are_merged_in_the_memory_of_the_first(dtype, length):
    from ringcore_torch.partials import finished

    generator = torch.Generator("cuda").manual_seed(4)

    def partial():
        out = torch.randn((2, 3, length, 72), generator=generator, device="cuda").to(dtype)
        lse = torch.randn((2, 3, length), generator=generator, device="cuda") * 20
        empty = torch.rand((2, 3, length), generator=generator, device="cuda") < 0.2
        out[empty] = 0.0
        return Partial(out, lse.masked_fill(empty, -torch.inf), torch.ones((), device="cuda").expand(lse.shape))

    first, second = partial(), partial()
    rows = slice(None), slice(None), slice(5, length - 7)
    wide = [Partial(x.weighted.double(), x.maximum.double(), x.total.double()) for x in (first, second)]
    part = Partial(*(x[rows] for x in (second.weighted, second.maximum, second.total)))
    due = ringcore.merge(*wide)
    before, lse = first.weighted.clone(), first.maximum.clone()
    out, maximum, total = finished(first, dtype, (rows, part))
    assert out.data_ptr() == first.weighted.data_ptr()
    assert bool((total == 1).all())
    close = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(out[rows].double(), due.out[rows], atol=close, rtol=close)
    torch.testing.assert_close(maximum[rows].double(), due.lse[rows], atol=2e-6, rtol=2e-6)
    outside = torch.ones(length, dtype=torch.bool, device="cuda")
    outside[5 : length - 7] = False
    assert torch.equal(out[:, :, outside], before[:, :, outside])
    assert torch.equal(maximum[:, :, outside], lse[:, :, outside])


def test_unseen_numbers_never_leak():
    from ringcore_torch.partials import merge_rows

    nan = torch.full((1, 1, 8, 16), torch.nan, device="cuda")
    empty, one = torch.full((1, 1, 8), -torch.inf, device="cuda"), torch.ones((1, 1, 8), device="cuda")
    everything = slice(None), slice(None), slice(None)
    state = Partial(torch.ones_like(nan), one * 3, one * 2)
    merged = merge_rows(state, everything, Partial(nan, empty, one * 0))
    assert torch.equal(merged.weighted, torch.ones_like(nan))
    state = Partial(nan.clone(), empty.clone(), one * 0)
    merged = merge_rows(state, everything, Partial(torch.ones_like(nan), one, one))
    assert torch.equal(merged.out, torch.ones_like(nan))


def test_the_best_that_can_is_taken():
    from ringcore.discovery import choose_kernels

    def chosen(width, dtype, *needs):
        x = torch.empty((1, 1, 8, width), dtype=dtype, device="cuda")
        return choose_kernels(None, x, x, frozenset(needs))[0].capabilities.name

    assert chosen(64, torch.bfloat16, "gradient", "window", "softcap") == "torch.cuda.flash4"
    assert chosen(60, torch.bfloat16) == TRITON
    assert chosen(64, torch.float32, "gradient") == "torch.cuda.efficient"
    assert chosen(62, torch.float32) == TRITON
    assert chosen(64, torch.float64) == "reference"
    assert chosen(64, torch.bfloat16, "mask", "gradient") == FRONTEND
    assert chosen(64, torch.bfloat16, "mask", "bias", "gradient") == TRITON
    assert chosen(64, torch.bfloat16, "bias") == TRITON
    assert chosen(64, torch.bfloat16, "mask", "softcap") == TRITON
    assert chosen(64, torch.bfloat16, "bias_gradient") == TRITON
