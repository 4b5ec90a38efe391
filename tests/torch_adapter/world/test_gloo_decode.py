"""Decoding over a cache on all ranks of a torch.distributed ring."""

import pytest
import torch
import torch.distributed as dist
from decoding import CALLS, check

from ringcore_torch import TorchTransport


@pytest.fixture(scope="module")
def ring(world):
    return TorchTransport(dist.group.WORLD)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("name", CALLS)
def test_decoding(ring, layout, name, rows):
    bits = check(ring, layout, name, rows, torch.from_numpy, lambda x: x.numpy())
    found = [None] * ring.size
    dist.all_gather_object(found, bits)
    assert len(set(found)) == 1
