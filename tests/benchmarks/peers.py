"""Other rings for GPUs, in their best modes, to be timed beside ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import flash_attn_stand_in
import torch
import torch.distributed as dist
from gpu import Attend, Call, Tensor


@contextmanager
def context_parallel(rotate: str, arrays: list[Tensor], dout: Tensor | None) -> Iterator[Call]:
    """A call of torch's own ring attention on this rank's part of the arrays, in one of its modes, on cuDNN."""
    from torch.distributed.tensor.experimental import context_parallel as shared
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    buffers = [x.transpose(1, 2).contiguous() for x in (arrays if dout is None else [*arrays, dout])]
    mesh = dist.init_device_mesh("cuda", (dist.get_world_size(),))
    # Entering cuts the buffers, in torch's balanced order, which is that of zigzag.
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION),
        shared(mesh, buffers=buffers, buffer_seq_dims=[2] * len(buffers), no_restore_buffers=set(buffers)),
    ):
        leaves = [x.detach().requires_grad_(dout is not None) for x in buffers[:3]]

        def call() -> tuple[Tensor, ...]:
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
            gradients = () if dout is None else torch.autograd.grad(out, leaves, buffers[3])
            return tuple(x.transpose(1, 2) for x in (out, *gradients))

        yield call


def ring_flash_attn() -> Attend:
    """ring-flash-attn's zigzag ring over all ranks, its best mode for causal attention, on torch's FlashAttention-2.

    Raises ImportError where the package is not installed.
    """
    zigzag = ring_flash_attn_module("zigzag_ring_flash_attn").zigzag_ring_flash_attn_func
    return lambda q, k, v: zigzag(q, k, v, causal=True)


def ring_flash_attn_module(name: str) -> ModuleType:
    """A module of ring-flash-attn, unmodified, on the stand-in for flash_attn.

    Raises ImportError where the package is not installed. Its top module is passed by: that patches transformers, and
    fails beside a new one.
    """
    if "ring_flash_attn" not in sys.modules:
        found = importlib.util.find_spec("ring_flash_attn")
        if found is None:
            raise ImportError("the package ring-flash-attn is not installed")
        flash_attn_stand_in.install()
        package = ModuleType("ring_flash_attn")
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["ring_flash_attn"] = package
    return importlib.import_module(f"ring_flash_attn.{name}")
