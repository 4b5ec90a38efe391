"""A call of all ranks as a CUDA graph."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from gpu import Call


def graphed(call: Call) -> Call:
    """The call, captured on every rank, as its replay.

    Raises RuntimeError on every rank, saying why, if it could not be captured on one; what the call worked on is then
    of no further use.
    """
    current = torch.cuda.current_stream()
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    dist.barrier()
    graph, result, failure = torch.cuda.CUDAGraph(), None, ""
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events meanwhile
            result = call()
    except Exception as exc:
        failure = reason(exc)
        torch.cuda.set_stream(current)  # which a capture that cannot be ended leaves behind
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=hosts())
    if any(failures):
        raise RuntimeError(f"no graph: {'; '.join(f'rank {n}: {why}' for n, why in enumerate(failures) if why)}")

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@cache
def hosts() -> Any:
    """A gloo group of all ranks: what failed on a GPU must not be told over GPUs."""
    return dist.new_group(backend="gloo")


def reason(exc: BaseException) -> str:
    """What happened first: ending a capture that failed fails in turn."""
    while exc.__context__ is not None:
        exc = exc.__context__
    return f"{type(exc).__name__}: {exc}"
