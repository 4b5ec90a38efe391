"""The kernels in Triton by its interpreter, which runs them on the CPU: TRITON_INTERPRET=1 in the environment.

It multiplies no bfloat16, and says nothing of what a GPU's compiler makes of them.
"""

import functools
import os
from dataclasses import replace

import pytest
import torch
from terms import NAMES, check, check_nan

import ringcore
from ringcore.merge import merge_rows
from ringcore_torch import one_pass, partials
from ringcore_torch.triton_cuda import Triton

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("set TRITON_INTERPRET=1")

pytestmark = pytest.mark.timeout(300)


class Interpreted(Triton):
    capabilities = replace(Triton.capabilities, devices=frozenset({"cpu"}))


KERNELS = Interpreted()
GROUPED = 2, 4, 2, 37, 53, 8, 12


@pytest.mark.parametrize("name", NAMES)
def test_terms(name):
    check(KERNELS, "cpu", torch.float32, GROUPED, name)


@pytest.mark.parametrize("name", ["nothing", "mask for all", "everything"])
def test_several_blocks(name):
    check(KERNELS, "cpu", torch.float32, (1, 2, 1, 150, 150, 16, 16), name)


@pytest.mark.parametrize("name", ["mask of rows", "bias of rows"])
def test_one_column_of_numbers(name):
    check(KERNELS, "cpu", torch.float32, (1, 1, 1, 70, 9, 1, 3), name)


@pytest.mark.parametrize("name", ["bias of finfo.min", "bias of keys", "everything", "dropout"])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_rings(name, layout):
    check(KERNELS, "cpu", torch.float32, (2, 4, 2, 37, 37, 8, 12), name, size=3, layout=layout, memory="bshd")


@pytest.mark.parametrize("name", ["mask", "bias with -inf", "dropout", "dropout and bias"])
def test_half_types_and_a_bias_of_another(name):
    check(KERNELS, "cpu", torch.float16, (1, 2, 2, 37, 53, 60, 20), name)
    check(KERNELS, "cpu", torch.float16, (1, 2, 2, 37, 53, 16, 16), name, bias_dtype=torch.float64)


@pytest.mark.parametrize("name", ["mask", "mask for all", "mask of keys"])
def test_what_no_row_sees_reaches_nothing(name):
    check(KERNELS, "cpu", torch.float32, GROUPED, name, poison=True)


@pytest.mark.parametrize("head_offset", ["modulo", "block"])
def test_dropout_of_every_second_head(head_offset):
    q, k, v, dout = (torch.randn((1, 4, 40, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    branches = {"segment_lengths": [16, 40], "dilation_rates": [1, 2], "head_offset": head_offset}

    def results(kernels):
        (out, _), pullback = ringcore.dilated_attention_vjp(
            q, k, v, **branches, dropout=0.4, dropout_seed=3, kernels=kernels, ring_size=2
        )
        return out, *pullback(dout)

    for mine, due in zip(results(KERNELS), results("reference"), strict=True):
        torch.testing.assert_close(mine, due, atol=1e-5, rtol=1e-5)


def test_nan_shows_where_it_is_seen():
    check_nan(KERNELS, "cpu")


def test_the_bits_are_the_same_again():
    q, k, v = (torch.randn((2, 4, 70, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3))

    def gradients():
        bias = torch.cos(torch.arange(70.0))[None, :]
        (out, lse), pullback = ringcore.ring_attention_vjp(
            q, k, v, bias=bias, wrt=("q", "k", "v", "bias"), kernels=KERNELS
        )
        return pullback(torch.sin(out), torch.cos(lse))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


SLICES = (
    (slice(0, 4), slice(0, 37)),
    (slice(0, 3, 2), slice(0, 37, 2)),
    (slice(1, 4, 2), slice(1, 36, 2)),
    (slice(3, 4), slice(3, 36, 4)),
    (slice(0, 2), slice(5, 6)),
)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_partials_come_together_in_one_pass(dtype, first):
    """Equal to one after the other; rows that saw nothing hold NaN, and give 0."""
    q, parts = torch.empty(2, 4, 37, 1), []
    state = ringcore.empty_partial(q, 24)
    for heads, rows in SLICES[first:]:
        index = slice(None), heads, rows, ...
        shape = q[index].shape[:3]
        weighted = torch.randn(*shape, 24).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        lse = torch.randn(shape)
        lse[0, 0, 0], weighted[0, 0, 0] = -torch.inf, torch.nan
        parts.append((index, ringcore.Partial(weighted, lse, torch.ones(()).expand(shape))))
        state = merge_rows(state, *parts[-1])
    due = state.out
    out, lse, total = partials.finished_together(q, 24, parts, dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), due, atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=2e-3)
    torch.testing.assert_close(lse, state.lse, atol=1e-5, rtol=1e-5)
    assert total.numel() == lse.numel()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_partials_of_all_ranks_are_merged_and_finished_in_one_launch(dtype, count):
    weighted, maximum = torch.randn(count, 2, 3, 4, 5), 50 * torch.randn(count, 2, 3, 4)
    total = torch.rand(count, 2, 3, 4) + 0.5
    # Rows of which one rank saw nothing, or none did, whatever they hold; and NaN, which must show.
    for ranks, head, row, told in ((slice(0, 1), 0, 0, 0.0), (slice(None), 0, 1, 0.0), (slice(0, 1), 1, 1, 1.0)):
        weighted[ranks, :, head, row], total[ranks, :, head, row] = torch.nan, told
        maximum[ranks, :, head, row] = -torch.inf
    total[0, :, 2, 0] = maximum[0, :, 2, 1] = weighted[0, :, 2, 2] = torch.nan
    parts = [ringcore.Partial(*x) for x in zip(weighted, maximum, total, strict=True)]
    due = functools.reduce(ringcore.merge, parts, ringcore.empty_partial(weighted[0], 5))
    packed = torch.cat([weighted, maximum[..., None], total[..., None]], -1)
    out, lse = one_pass.finished_packed(packed, dtype)
    assert out.dtype == dtype
    alike = {"rtol": 1e-2, "equal_nan": True}
    torch.testing.assert_close(out.float(), due.out, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, **alike)
    torch.testing.assert_close(lse, due.lse, atol=1e-5, **alike)
    assert out[:, 2, 2].isnan().all()


@pytest.mark.parametrize("axes", ["heads first", "rows first"])
def test_parts_of_a_gradient_come_together_in_one_pass(axes):
    like = torch.empty(2, 4, 37, 24) if axes == "heads first" else torch.empty(2, 37, 4, 24).transpose(1, 2)
    due, parts = torch.zeros(2, 4, 37, 24), []
    for heads, rows in SLICES[1:]:
        index = slice(None), heads, rows, ...
        parts.append((index, torch.randn(due[index].shape).half()))
        due[index] += parts[-1][1]
    came = partials.summed_together(like, parts, torch.float32)
    assert came.stride() == like.stride()
    torch.testing.assert_close(came, due)
    assert partials.summed_together(like, parts * 5, torch.float32) is None  # more of one head than one pass takes
    of_one_entry = (slice(0, 1), *parts[0][0][1:]), parts[0][1][:1]
    assert partials.summed_together(like, [*parts, of_one_entry], torch.float32) is None


def test_a_call_of_many_tiles_is_brought_together(monkeypatch):
    """As on a GPU: all partials, and all parts of each gradient, in one pass."""
    ran = []
    monkeypatch.setattr(partials, "gathers", lambda x: True, raising=True)
    for name in ("finished_together", "summed_together"):
        own = getattr(partials, name)
        monkeypatch.setattr(partials, name, lambda *a, own=own: ran.append(own.__name__) or own(*a))
    q, k, v, dout = (torch.randn(1, 4, 32, 8) for _ in range(4))
    branches = {"segment_lengths": [8, 16], "dilation_rates": [2, 4], "causal": True}
    (out, lse), pullback = ringcore.dilated_attention_vjp(q, k, v, kernels="torch.cpu", **branches)
    gradients = pullback(dout)
    wide = [x.double() for x in (q, k, v)]
    (due, due_lse), of_due = ringcore.dilated_attention_vjp(*wide, kernels="reference", **branches)
    for mine, expected in zip((out, lse, *gradients), (due, due_lse, *of_due(dout.double())), strict=True):
        torch.testing.assert_close(mine.double(), expected, atol=1e-5, rtol=1e-5)
    assert ran == ["finished_together", *["summed_together"] * 3]
