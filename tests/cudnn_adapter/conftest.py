"""The adapter over a stand-in for cuDNN, and host tensors that pass for those of a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import array_api_compat.torch
import fake_cudnn
import pytest
import torch
from fake_cudnn import adapter


class HostArrays:
    """Host tensors as if they were on GPU 0; fresh memory is full of NaN."""

    xp = array_api_compat.torch

    def __init__(self):
        self.wants_determinism = False
        self.kept = torch.ones((), dtype=torch.float32)

    def address(self, x):
        return x.data_ptr()

    def strides(self, x):
        return x.stride()

    def empty(self, shape, like, dtype=None):
        return torch.full(shape, torch.nan, dtype=dtype or like.dtype)

    def ones(self, like):
        return torch.ones_like(like) if like.numel() == 1 else self.kept.expand(like.shape)

    def where(self, condition, x, y):
        return torch.where(condition, x, y)

    def allocate(self, size, like):
        room = torch.empty(size, dtype=torch.uint8)
        return room.data_ptr(), room

    def device(self, x):
        return 0

    def stream(self, x):
        return 1234

    def on(self, x):
        return nullcontext()

    def deterministic(self):
        return self.wants_determinism

    def capturing(self):
        return False


@pytest.fixture
def cudnn():
    """What takes the place of the module."""
    with adapter() as module:
        yield module


@pytest.fixture(scope="module", params=fake_cudnn.EMPTY)
def kernels(request):
    """Kernels over a stand-in of their own, for each that it may say of a row without keys."""
    with adapter(empty=request.param):
        from ringcore_cudnn import CudnnFrontend

        made = CudnnFrontend(HostArrays(), "host.cudnn", "torch", frozenset({"cpu"}), 256)
    return made
