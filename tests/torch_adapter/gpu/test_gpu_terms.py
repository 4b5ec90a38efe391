"""The kernels in Triton on a GPU against dense attention in float64: bias, mask, soft cap, float32, any widths."""

from __future__ import annotations

import pytest
import torch
from terms import NAMES, check, check_nan

import ringcore

pytestmark = pytest.mark.timeout(300)
TRITON = "torch.cuda.triton"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "grouped, odd lengths": (2, 4, 2, 213, 333, 64, 64),
    "wide": (1, 2, 2, 130, 200, 128, 128),
    "odd widths": (2, 2, 1, 77, 77, 20, 60),
    "widest": (1, 2, 1, 100, 140, 256, 192),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_terms(name, dtype):
    check(TRITON, "cuda", dtype, SHAPES["grouped, odd lengths"], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nothing", "bias for all heads", "mask", "everything"])
@pytest.mark.parametrize("shape", list(SHAPES)[1:])
def test_widths(shape, name, dtype):
    check(TRITON, "cuda", dtype, SHAPES[shape], name)


@pytest.mark.parametrize("name", ["bias of finfo.min", "bias of keys", "mask", "everything"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rings(name, layout, dtype):
    check(TRITON, "cuda", dtype, (2, 4, 2, 301, 301, 64, 64), name, size=3, layout=layout, memory="bshd")


@pytest.mark.parametrize("name", ["nothing", "causal"])
@pytest.mark.parametrize("shape", [*SHAPES, "tall", "one row"])
def test_the_kernels_of_torch_in_float32(shape, name):
    sizes = {**SHAPES, "tall": (2, 4, 2, 301, 64, 36, 68), "one row": (2, 4, 4, 1, 70, 64, 64)}[shape]
    check("torch.cuda.efficient", "cuda", torch.float32, sizes, name)


@pytest.mark.parametrize("memory", ["bhsd", "bshd"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_rings_of_the_kernels_of_torch_in_float32(layout, memory):
    sizes = (2, 4, 2, 301, 301, 64, 64)
    check("torch.cuda.efficient", "cuda", torch.float32, sizes, "causal", size=3, layout=layout, memory=memory)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64])
def test_a_bias_of_another_type_is_not_rounded_to_that_of_q(bias_dtype):
    check(TRITON, "cuda", torch.bfloat16, SHAPES["grouped, odd lengths"], "bias for all heads", bias_dtype=bias_dtype)


@pytest.mark.parametrize("name", ["mask", "mask for all", "mask of keys"])
def test_what_no_row_sees_reaches_nothing(name):
    check(TRITON, "cuda", torch.bfloat16, SHAPES["grouped, odd lengths"], name, poison=True)


def test_nan_shows_where_it_is_seen():
    check_nan(TRITON, "cuda")


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_keeps_its_digits_whatever_torch_allows_its_own_products(allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        q, k, v = (torch.randn((1, 2, 500, 128), device="cuda") for _ in range(3))
        mask = torch.rand((500, 500), device="cuda") < 0.5
        out = ringcore.ring_attention(q, k, v, mask=mask, kernels=TRITON)
        due = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask)
        assert float((out - due).abs().max()) < 2e-6 * float(v.abs().max())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_the_same_again(dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn((2, 4, 700, 64), generator=generator, device="cuda").to(dtype) for _ in range(3))
    bias = torch.randn((1, 700), generator=generator, device="cuda")

    def results():
        (out, lse), pullback = ringcore.ring_attention_vjp(
            q, k, v, bias=bias, wrt=("q", "k", "v", "bias"), kernels=TRITON
        )
        return out, lse, *pullback(torch.sin(out), torch.cos(lse))

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)


def test_no_score_block_is_made():
    q, k, v = (torch.randn((1, 8, 4096, 64), device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = torch.rand((4096, 4096), device="cuda") < 0.5
    torch.autograd.grad(ringcore.ring_attention(q, k, v, mask=mask, kernels=TRITON).sum(), (q, k, v))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ringcore.ring_attention(q, k, v, mask=mask, kernels=TRITON).sum(), (q, k, v))
    one = q.numel() * 4  # float32 of q's shape; a block of scores would be 64 of them
    assert torch.cuda.max_memory_allocated() - before < 8 * one


def test_a_mask_of_more_than_2_to_the_31_bytes():
    rows = 47000
    q, k, v = (torch.randn((1, 1, rows, 16), device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.zeros((rows, rows), dtype=torch.bool, device="cuda")
    mask.fill_diagonal_(True)
    out = ringcore.ring_attention(q, k, v, mask=mask, kernels=TRITON)
    torch.testing.assert_close(out, v)


def test_it_is_what_is_left_that_it_takes():
    from ringcore.discovery import choose_kernels

    def chosen(width, dtype, *needs):
        x = torch.empty((1, 1, 8, width), dtype=dtype, device="cuda")
        return choose_kernels(None, x, x, frozenset(needs))[0].capabilities.name

    assert chosen(64, torch.float32) == TRITON
    assert chosen(64, torch.float32, "gradient", "softcap") == TRITON
    assert chosen(64, torch.bfloat16, "bias", "gradient", "bias_gradient") == TRITON
    assert chosen(64, torch.float64, "mask") == "reference"


def test_captured_in_a_graph():
    q, k, v = (torch.randn((1, 2, 300, 64), device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.rand((300, 300), device="cuda") < 0.5
    due = ringcore.ring_attention(q, k, v, mask=mask, kernels=TRITON)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ringcore.ring_attention(q, k, v, mask=mask, kernels=TRITON)
    out.zero_()
    graph.replay()
    assert torch.equal(out, due)
