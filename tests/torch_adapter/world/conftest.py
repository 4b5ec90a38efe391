"""The groups of ranks that tests ask for: ``torchrun --nproc-per-node 4 -m pytest tests/torch_adapter/world``."""

import os

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def world():
    """One world for the whole session; without torchrun it has one rank, as MPI's has without mpiexec."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def group(world):
    """A function that gives the process group of so many ranks, or None on the others."""
    made = []

    def some(size, order=1):
        if size > dist.get_world_size():
            pytest.skip(f"needs {size} ranks")
        new = dist.new_group(range(size)[::order], sort_ranks=False)
        if new == dist.GroupMember.NON_GROUP_MEMBER:
            return None
        made.append(new)
        return new

    yield some
    for one in made:
        dist.destroy_process_group(one)
