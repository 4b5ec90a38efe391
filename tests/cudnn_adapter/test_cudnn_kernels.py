"""The kernels over a stand-in for cuDNN against dense attention in float64: the border, not cuDNN, is what is tested."""

from __future__ import annotations

import pytest
import torch
from dense_torch import dense

import ringcore
from ringcore import Score, Tile

OUT = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
GRADIENT = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
SQUARE = (2, 4, 2, 45, 45, 16, 16)


def draw(dtype, batch, heads, key_heads, rows, keys, width, values):
    generator = torch.Generator().manual_seed(7)
    shapes = (batch, heads, rows, width), (batch, key_heads, keys, width), (batch, key_heads, keys, values)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def check(
    kernels,
    shape,
    dtype=torch.float16,
    size=1,
    layout="contiguous",
    memory="bhsd",
    dlse_too=True,
    arrays=None,
    **keywords,
):
    arrays = arrays or draw(dtype, *shape)
    if memory == "bshd":
        arrays = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    given = [x.detach().requires_grad_() for x in arrays]
    asked = dict(keywords)
    if "offset" in asked:
        asked["query_offset"] = asked.pop("offset")
    out, lse = ringcore.ring_attention(*given, ring_size=size, layout=layout, kernels=kernels, return_lse=True, **asked)
    generator = torch.Generator().manual_seed(8)
    dout = torch.randn(out.shape, generator=generator).to(dtype)
    dlse = torch.randn(lse.shape, generator=generator) if dlse_too else torch.zeros_like(lse)
    came = torch.autograd.grad([out, lse] if dlse_too else [out], given, [dout, dlse] if dlse_too else [dout])
    due, due_lse, gradients = dense(*arrays, dout, dlse, **keywords)
    assert float((out.detach().double() - due).abs().max() / arrays[2].abs().max()) < OUT[dtype]
    seen = due_lse > -torch.inf
    assert (lse[~seen] == -torch.inf).all()
    assert (out[~seen] == 0).all()
    torch.testing.assert_close(lse[seen].double(), due_lse[seen], atol=2e-5, rtol=2e-5)
    for mine, expected in zip(came, gradients, strict=True):
        assert mine.isfinite().all()
        assert float((mine.double() - expected).abs().max() / expected.abs().max().clamp(min=1)) < GRADIENT[dtype]


def coins(*shape, part=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(10)) < part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [SQUARE, (1, 2, 2, 1, 77, 16, 16), (1, 4, 1, 60, 24, 8, 24), (1, 2, 1, 24, 60, 24, 8)]
)
def test_shapes(kernels, shape, causal, dtype):
    check(kernels, shape, dtype, causal=causal)


@pytest.mark.parametrize("memory", ["bhsd", "bshd"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 4, 2, 45, 45, 20, 20), (1, 4, 1, 60, 24, 5, 24), (1, 2, 1, 24, 60, 24, 3), (1, 1, 1, 1, 1, 3, 5)]
)
def test_widths_are_rounded_up_to_what_cudnn_takes(kernels, shape, masked, memory):
    rows, keys = shape[3:5]
    mask = {"mask": coins(1, 1, rows, keys)} if masked else {}
    check(kernels, shape, memory=memory, causal=rows == keys, **mask)
    q, k, v = (x.requires_grad_() for x in draw(torch.float16, *shape))
    out = ringcore.ring_attention(q, k, v, kernels=kernels)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.is_contiguous() for x in (out, *found))


@pytest.mark.parametrize("keywords", [
    {"window": (5, 2)}, {"window": (4, None)}, {"window": (None, 3)}, {"window": (0, 0)}, {"causal": True, "window": (7, 0)},
    {"causal": True, "offset": 9}, {"causal": True, "offset": -7}, {"window": (10, 5), "offset": 20},
    {"key_lengths": (20, 0)}, {"causal": True, "key_lengths": (40, 3)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_query_sees(kernels, keywords, size, masked):
    mask = {"mask": coins(45, 45)} if masked else {}
    check(kernels, SQUARE, size=size, layout="zigzag", **keywords, **mask)


MASKS = {
    "pairs": {"mask": coins(2, 4, 45, 45)},
    "keys": {"mask": coins(2, 1, 1, 45), "causal": True},
    "rows": {"mask": coins(1, 4, 45, 1)},
    "none seen": {"mask": torch.zeros(1, 1, 45, 45, dtype=torch.bool)},
    "empty rows": {"mask": coins(2, 1, 45, 45) & (torch.arange(45) % 7 > 0)[:, None], "window": (9, 4)},
    "other memory": {"mask": coins(2, 4, 45, 45).mT, "causal": True, "window": (9, 0)},
}


@pytest.mark.parametrize("memory", ["bhsd", "bshd"])
@pytest.mark.parametrize(("size", "layout"), [(1, "contiguous"), (2, "zigzag"), (3, "striped")])
@pytest.mark.parametrize("name", MASKS)
def test_masks(kernels, name, size, layout, memory):
    check(kernels, SQUARE, size=size, layout=layout, memory=memory, **MASKS[name])


def test_a_row_that_sees_nothing_is_the_empty_partial(kernels):
    rows, others = (range(45),), torch.arange(45) != 9
    tile = Tile(slice(None), slice(None), slice(None), slice(0, 45), slice(0, 45), rows, rows)
    mask = coins(1, 1, 45, 45) & others[:, None]
    part = kernels.forward(*draw(torch.float16, *SQUARE), score=Score(0.25), tile=tile, mask=mask)
    for x, due in ((part.weighted, 0.0), (part.maximum, -torch.inf), (part.total, 0.0)):
        assert (x[:, :, 9] == due).all()
    assert part.maximum[:, :, others].isfinite().all()


def test_single_rows_and_keys(kernels):
    check(kernels, (1, 2, 1, 3, 3, 8, 8), size=3, causal=True)
    check(kernels, (1, 2, 1, 3, 3, 8, 8), size=3, mask=coins(3, 3))


@pytest.mark.parametrize("rows", [1, 45])
def test_very_negative_scores_have_gradients(kernels, rows):
    q, k, v = draw(torch.float16, 1, 2, 2, rows, 45, 16, 16)
    q, k = q * 0.1 + 5.5, k * 0.1 - 5.5  # every score is near -120
    (_, lse), pullback = ringcore.ring_attention_vjp(q, k, v, kernels=kernels)
    assert (lse < -100).all()
    _, due = ringcore.ring_attention_vjp(*(x.double() for x in (q, k, v)), kernels="reference")
    dout = torch.ones_like(q)
    for mine, expected in zip(pullback(dout), due(dout.double()), strict=True):
        torch.testing.assert_close(mine.double(), expected, atol=0.02, rtol=0.02)


def test_what_is_not_aligned_is_copied(kernels):
    q, k, v = (torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in draw(torch.float16, *SQUARE))
    check(kernels, None, arrays=[q, k, v], mask=coins(1, 1, 47, 61)[:, :, 1:46, 9:54], causal=True)


def test_what_is_aligned_is_read_where_it_is(kernels, monkeypatch):
    q, k, v = draw(torch.float16, 1, 2, 2, 16, 24, 16, 16)
    mask = coins(1, 2, 16, 24)
    copies, own = [], kernels._arrays.empty

    def empty(shape, like, dtype=None):
        copies.append(tuple(shape))
        return own(shape, like, dtype)

    monkeypatch.setattr(kernels._arrays, "empty", empty)
    ringcore.ring_attention(q, k, v, mask=mask, kernels=kernels)
    before = len(copies)
    ringcore.ring_attention(q, k, v, mask=mask, kernels=kernels)
    assert copies[before:] == [(1, 2, 16, 16), (1, 2, 16)]  # out and lse alone


def test_numbers_in_keys_that_nobody_sees_stay_there(kernels):
    q, k, v = draw(torch.float16, 1, 2, 1, 16, 24, 16, 16)
    mask = torch.ones(16, 24, dtype=torch.bool)
    mask[:, 5] = False
    due = ringcore.ring_attention(q, k, v, mask=mask, kernels=kernels)
    k[:, :, 5], v[:, :, 5] = torch.nan, torch.inf
    (out, _), pullback = ringcore.ring_attention_vjp(q, k, v, mask=mask, kernels=kernels)
    assert torch.equal(out, due)
    assert all(x.isfinite().all() for x in pullback(torch.ones_like(out)))


def test_nan_in_a_query_is_not_hidden(kernels):
    q, k, v = draw(torch.float16, 1, 2, 1, 16, 24, 16, 16)
    q[:, :, 3] = torch.nan
    for terms in ({}, {"mask": coins(16, 24)}):
        out, lse = ringcore.ring_attention(q, k, v, kernels=kernels, return_lse=True, **terms)
        assert out[:, :, 3].isnan().all()
        assert lse[:, :, 3].isnan().all()
        assert out[:, :, :3].isfinite().all()


def test_determinism_is_asked_for(kernels, monkeypatch):
    q, k, v = draw(torch.float16, *SQUARE)
    asked, run = [], kernels._engine.run
    monkeypatch.setattr(
        kernels._engine, "run", lambda problem, *a, **kw: asked.append(problem) or run(problem, *a, **kw)
    )
    for wanted in (False, True):
        monkeypatch.setattr(kernels._arrays, "wants_determinism", wanted)
        _, pullback = ringcore.ring_attention_vjp(q, k, v, kernels=kernels)
        pullback(torch.ones_like(q))
        assert asked[-1].deterministic is wanted


def test_memory_follows_the_inputs(kernels):
    rows = (range(45),)
    tile = Tile(slice(None), slice(None), slice(None), slice(0, 45), slice(0, 45), rows, rows)
    arrays = draw(torch.float16, *SQUARE)
    for q, k, v in (arrays, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]):
        part = kernels.forward(q, k, v, score=Score(0.25), tile=tile)
        assert part.weighted.stride() == q.stride()


def test_softcap_and_bias_are_refused(kernels):
    q, k, v = draw(torch.float16, *SQUARE)
    with pytest.raises(ringcore.UnsupportedError, match="no softcap"):
        ringcore.ring_attention(q, k, v, softcap=3.0, kernels=kernels)
    with pytest.raises(ringcore.UnsupportedError, match="they have no bias"):
        ringcore.ring_attention(q, k, v, bias=torch.zeros(45, 45), kernels=kernels)


def test_one_number_is_the_total_of_all_rows_but_of_a_single_one(kernels):
    def totals(*shape):
        q, k, v = draw(torch.float16, *shape)
        tile = Tile(*[slice(None)] * 5, (range(q.shape[2]),), (range(k.shape[2]),))
        return [kernels.forward(q, k, v, score=Score(0.25), tile=tile).total for _ in range(2)]

    first, second = totals(*SQUARE)
    assert first.shape == (2, 4, 45)
    assert first.data_ptr() == second.data_ptr()
    first, second = totals(1, 1, 1, 1, 9, 16, 16)
    first.zero_()
    assert (second == 1).all()
    assert kernels._arrays.kept == 1
