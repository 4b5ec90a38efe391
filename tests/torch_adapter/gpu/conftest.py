"""What all tests on one GPU share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned():
    """What the allocator hands out next is full of NaN, so that nothing unwritten goes unseen."""
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 25) for _ in range(3)]
    del blocks
    yield
    torch.cuda.synchronize()
