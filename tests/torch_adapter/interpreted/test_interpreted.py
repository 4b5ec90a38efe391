"""The kernels in Triton by its interpreter, which runs them on the CPU: TRITON_INTERPRET=1 in the environment.

It multiplies no bfloat16, and says nothing of what a GPU's compiler makes of them.
"""

import os
from dataclasses import replace

import pytest
import torch
from terms import NAMES, check, check_nan

import ringcore
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
