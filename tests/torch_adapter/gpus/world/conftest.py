"""A world of GPUs, one for each rank: ``torchrun --nproc-per-node 2 -m pytest tests/torch_adapter/gpus/world``."""

import os

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def world():
    """One world for the whole session, whose own group is gloo's."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _poisoned():
    """What the allocator hands out next is full of NaN, so that nothing unwritten goes unseen."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 25) for _ in range(3)]
    del blocks
    yield
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.cuda.synchronize()
    dist.barrier()
