"""What the benchmarks on GPUs share: how calls are timed, checked and reported."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEVICE = "cuda"
HEADS, WIDTH = 16, 128
NAMES = ("out", "dq", "dk", "dv")

Tensor = torch.Tensor
Call = Callable[[], Any]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(length: int) -> list[Tensor]:
    """q, k, v and dout [1, length, heads, width], equal in every process."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = 1, length, HEADS, WIDTH
    return [torch.randn(shape, generator=generator, device=DEVICE).to(torch.bfloat16) for _ in range(4)]


def poison() -> None:
    """What the allocator hands out next is full of NaN."""
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 24,), torch.nan, device=DEVICE) for _ in range(40)]
    del blocks


def flash4() -> Attend | None:
    """Causal attention of flash-attn-4 over [B, S, H, D]; None where it is not installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)[0]


def aten(backend: str) -> Attend:
    """Torch's causal attention over [B, S, H, D], by the kernels of this name in SDPBackend."""
    only = getattr(torch.nn.attention.SDPBackend, backend)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(only):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    return attend


def best() -> tuple[str, Attend]:
    """The name of the fastest kernels for one GPU that are installed, and their attention."""
    attend = flash4()
    return ("flash-attn-4", attend) if attend else ("cuDNN", aten("CUDNN_ATTENTION"))


def without_gradients(attend: Attend, arrays: Sequence[Tensor]) -> Call:
    """A call for out alone."""

    def call() -> Tensor:
        with torch.no_grad():
            return attend(*arrays)

    return call


def with_gradients(attend: Attend, arrays: Sequence[Tensor], dout: Tensor) -> Call:
    """A call for out, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in arrays]

    def call() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return call


def check(name: str, came: Any, due: Any) -> None:
    """Raise ValueError unless out and gradients are within 0.03 of the largest number due."""
    came, due = ((x,) if isinstance(x, Tensor) else x for x in (came, due))
    for each, x, y in zip(NAMES, came, due, strict=False):
        error = float((x.detach().float() - y.detach().float()).abs().max() / y.detach().float().abs().max())
        if not error < 0.03:
            raise ValueError(f"{name}: {each} is off by {error} of its largest number")


def timed(call: Call, calls: int) -> float:
    """Milliseconds of one call, of several queued ones; those of the slower rank, if there are ranks."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    spent = torch.tensor([start.elapsed_time(end) / calls])
    if dist.is_initialized():
        dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)


def in_turns(sides: Mapping[str, Call], calls: int, rounds: int) -> dict[str, float]:
    """The median milliseconds of each side; the order alternates."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        timed(call, 2)
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            times[name].append(timed(sides[name], calls))
    return {name: statistics.median(found) for name, found in times.items()}


def installed(name: str) -> str:
    """The version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def save(path: Path | None, gpus: int, results: Any) -> None:
    """Write the results, with hardware, versions and command, to ``path`` if there is one."""
    if path is None:
        return
    found = {
        "gpus": [torch.cuda.get_device_name(n) for n in range(gpus)], "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        **{name: installed(name) for name in ("triton", "flash-attn-4", "ring-flash-attn")},
        "command": " ".join(Path(word).name for word in sys.argv), "results": results,
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n")
