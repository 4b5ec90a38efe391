"""The kernels in Triton compiled for GPUs that need not be there: every size of blocks fits into them."""

import importlib
import os

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringcore_torch.triton_blocks import Blocks

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("the interpreter compiles nothing: unset TRITON_INTERPRET")

pytestmark = pytest.mark.timeout(300)
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a program may have, by compute capability
POINTERS = {"maximum", "total", "dlse", "delta", "weighted", "dq", "dk", "dv", "dbias"}
LIKE_Q = {"q", "k", "v", "bias", "dout", "out"}
CHOICES = {
    "banded": True, "biased": True, "masked": True, "soft": True, "drops": True, "with_dlse": True,
    "batch_once": True, "head_once": False, "row_once": False, "key_once": False,
}  # fmt: skip


def kernel_of(name):
    module = "forward" if name == "forward" else "backward"
    return getattr(importlib.import_module(f"ringcore_torch.triton_{module}"), name)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["forward", "query_gradient", "key_gradients", "bias_gradient"])
def test_it_fits(name, dtype, width, capability):
    assert compiled(name, dtype, width, capability).metadata.shared <= SHARED[capability]


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("name", ["forward", "query_gradient", "key_gradients", "bias_gradient"])
def test_every_choice_compiles(name, chosen):
    compiled(name, torch.float16, 16, 90, **dict.fromkeys(CHOICES, chosen))


def compiled(name, dtype, width, capability, **chosen):
    kernel = kernel_of(name)
    choices = {**CHOICES, **Blocks.of(name, dtype, width, width).choices, **chosen}
    options = {key: choices.pop(key) for key in ("num_warps", "num_stages")}
    number = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    signature, constants, aligned = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in choices or argument in ("bt", "mt"):
            signature[argument], constants[argument] = "constexpr", choices.get(argument, 1)
        elif argument in POINTERS:
            signature[argument] = "*fp32"
        elif argument == "mask":
            signature[argument] = "*u8"
        elif argument in LIKE_Q:
            signature[argument] = f"*{number}"
        else:
            signature[argument] = "fp32" if argument in ("scale", "softcap", "kept_scale") else "i32"
        if signature[argument].startswith("*") or len(argument) == 2:  # arrays and their strides
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("weighs", [False, True])
def test_what_brings_parts_together_compiles(weighs, count, capability):
    """With eight numbers of a half type in each load and store."""
    kernel = importlib.import_module("ringcore_torch.together")._together
    each = {"firsts", "steps", "counts", "value_batches", "value_rows", "known_batches", "known_rows"}
    choices = {"weighs": weighs, "count": count, "block": 16, "columns": 128, "unit": 16}
    signature, constants, aligned = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in choices:
            signature[argument], constants[argument] = "constexpr", choices[argument]
        elif argument in ("out", "lse"):
            signature[argument] = "*fp32" if weighs and argument == "lse" else "*bf16"
        elif argument in ("values", "known"):
            signature[argument] = ("*fp32" if weighs and argument == "known" else "*bf16",) * count
        else:
            signature[argument] = ("i32",) * count if argument in each else "i32"
        if argument in ("out", "ob", "os", "width"):
            aligned[place,] = [["tt.divisibility", 16]]
        if argument in ("values", "value_batches", "value_rows"):
            aligned |= {(place, n): [["tt.divisibility", 16]] for n in range(count)}
    source = ASTSource(kernel, signature, constants, aligned)
    text = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert text.count("ld.global.v4.b32") == 2 * count
    assert text.count("st.global.v4.b32") == 2
