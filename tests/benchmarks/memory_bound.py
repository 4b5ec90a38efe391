"""The memory of one rank's call on a GPU beyond its inputs and outputs, against what a ring should need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from gpu import HEADS, WIDTH, Attend, Call, Tensor

HALF, WIDE = 2, 4  # bytes of a number


def due(rows: int, workspace: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes by what they are for, for each direction, of a rank with so many rows and as many keys.

    workspace: of the kernels, as `workspace_of` measures it, for each direction.
    """
    array = rows * HEADS * WIDTH
    statistic = rows * HEADS * WIDE
    forward = {
        "two visiting blocks of k and v": 2 * 2 * array * HALF,
        "one float32 output with its maximum and total": array * WIDE + 2 * statistic,
        "one tile's out and lse": array * HALF + statistic,
        "the kernel's workspace": workspace["forward"],
    }
    # A tile's output is out and lse on the way forward, dq, dk and dv on the way back; and the larger workspace counts.
    both = {
        **{name: size for name, size in forward.items() if name.startswith(("two", "one float32"))},
        "one tile's dq, dk and dv": 3 * array * HALF,
        "the kernel's workspace": max(workspace.values()),
        "float32 dq": array * WIDE,
        "two float32 blocks of dk and dv": 2 * 2 * array * WIDE,
    }
    return {"forward": forward, "forward and backward": both}


def workspace_of(attend: Attend, arrays: list[Tensor], dout: Tensor) -> dict[str, int]:
    """Bytes that a kernel takes beyond its inputs and outputs on a rank's largest tile, its own block; measured."""
    found = {}
    leaves = [x.detach().requires_grad_() for x in arrays]
    with torch.no_grad():
        attend(*arrays)  # compiles, and sets up whatever a first call does
        peak, outputs = peak_of(lambda: attend(*arrays))
    found["forward"] = max(0, peak - outputs)
    out = attend(*leaves)
    torch.autograd.grad(out, leaves, dout, retain_graph=True)
    peak, outputs = peak_of(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    found["forward and backward"] = max(0, peak - outputs)
    return found


def peak_of(call: Call) -> tuple[int, int]:
    """(the most bytes beyond those held before that the caching allocator held during a call, bytes of its outputs)."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return peak, sum(x.nbytes for x in ([result] if isinstance(result, Tensor) else result))


@contextmanager
def peer_memory() -> Iterator[list[int]]:
    """Sizes of the symmetric memory that is made meanwhile, where the caching allocator's statistics do not see it."""
    sizes: list[int] = []
    make = symmetric_memory.empty

    def counted(*args: Any, **keywords: Any) -> Tensor:
        before = torch.cuda.memory_allocated()
        x = make(*args, **keywords)
        sizes.append(x.nbytes - (torch.cuda.memory_allocated() - before))
        return x

    symmetric_memory.empty = counted
    try:
        yield sizes
    finally:
        symmetric_memory.empty = make
