"""Kernels for half types on a GPU against dense attention in float64: out, lse and gradients."""

from __future__ import annotations

import torch
from dense_torch import dense

import ringcore

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
GRADIENT = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


def draw(dtype, batch, heads, key_heads, rows, keys, width, values):
    generator = torch.Generator("cuda").manual_seed(7)
    shapes = (batch, heads, rows, width), (batch, key_heads, keys, width), (batch, key_heads, keys, values)
    return [torch.randn(s, generator=generator, device="cuda", dtype=torch.float64).to(dtype) for s in shapes]


def check(name, dtype, shape, size=1, layout="contiguous", memory="bhsd", dlse_too=True, **keywords):
    arrays = draw(dtype, *shape)
    if memory == "bshd":
        arrays = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    given = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in arrays]
    asked = dict(keywords)
    if "offset" in asked:
        asked["query_offset"] = asked.pop("offset")
    out, lse = ringcore.ring_attention(*given, ring_size=size, layout=layout, kernels=name, return_lse=True, **asked)
    generator = torch.Generator("cuda").manual_seed(8)
    dout = torch.randn(out.shape, generator=generator, device="cuda").to(dtype)
    dlse = torch.randn(lse.shape, generator=generator, device="cuda") if dlse_too else torch.zeros_like(lse)
    came = torch.autograd.grad([out, lse] if dlse_too else [out], given, [dout, dlse] if dlse_too else [dout])
    due, due_lse, gradients = dense(*arrays, dout, dlse, **keywords)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.isfinite().all()
    assert float((out.detach().double() - due).abs().max() / arrays[2].abs().max()) < TOLERANCE[dtype]
    seen = due_lse > -torch.inf
    assert (lse[~seen] == -torch.inf).all()
    assert (out[~seen] == 0).all()
    torch.testing.assert_close(lse[seen].double(), due_lse[seen], atol=2e-5, rtol=2e-5)
    for x, mine, expected in zip(given, came, gradients, strict=True):
        assert mine.stride() == x.stride()
        assert mine.isfinite().all()
        assert float((mine.double() - expected).abs().max() / expected.abs().max().clamp(min=1)) < GRADIENT[dtype]
