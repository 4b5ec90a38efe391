"""Two GPUs: the ring against the best installed kernel on one GPU, whose time / 2 is the ideal, and torch's own ring.

    torchrun --nproc-per-node 2 tests/benchmarks/ring_gpu.py [--json FILE] [--lengths 8192 32768 131072]

bfloat16, 16 heads of 128, causal, random data. Each figure is the time between two CUDA events around queued calls,
divided by their number; the slower rank counts. Sides take turns; medians over the rounds are reported. Results are
compared with the one-GPU kernel's before anything is timed, in memory that was filled with NaN.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ringcore

HEADS, WIDTH, SIZE = 16, 128, 2
NAMES = ("out", "dq", "dk", "dv")

Call = Callable[[], Any]


def timed(call: Call, calls: int) -> float:
    """Milliseconds of one call on the slower rank, of several queued ones."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.barrier()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    spent = torch.tensor([start.elapsed_time(end) / calls])
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)


def draw(length: int) -> list[torch.Tensor]:
    """q, k, v and dout [1, length, heads, width], equal on both ranks."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = 1, length, HEADS, WIDTH
    return [torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16) for _ in range(4)]


def poison() -> None:
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 24,), torch.nan, device="cuda") for _ in range(40)]
    del blocks


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The best installed kernel for one GPU, called directly; [B, S, H, D]."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    out: torch.Tensor = flash_attn_func(q, k, v, causal=True)[0]
    return out


def with_gradients(attend: Callable[..., torch.Tensor], arrays: list[torch.Tensor], dout: torch.Tensor) -> Call:
    leaves = [x.detach().requires_grad_() for x in arrays]

    def call() -> tuple[torch.Tensor, ...]:
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    return call


def graphed(call: Call) -> Call:
    """The call as a CUDA graph, replayed."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events meanwhile
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@contextmanager
def context_parallel(rotate: str, arrays: list[torch.Tensor], dout: torch.Tensor | None) -> Iterator[Call]:
    """A call of torch's own ring attention on this rank's part of the arrays, in one of its modes, on cuDNN."""
    from torch.distributed.tensor.experimental import context_parallel as shared
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotate)
    buffers = [x.transpose(1, 2).contiguous() for x in (arrays if dout is None else [*arrays, dout])]
    mesh = dist.init_device_mesh("cuda", (SIZE,))
    # Entering cuts the buffers, in torch's balanced order, which is that of zigzag.
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION),
        shared(mesh, buffers=buffers, buffer_seq_dims=[2] * len(buffers), no_restore_buffers=set(buffers)),
    ):
        leaves = [x.detach().requires_grad_(dout is not None) for x in buffers[:3]]

        def call() -> tuple[torch.Tensor, ...]:
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
            gradients = () if dout is None else torch.autograd.grad(out, leaves, buffers[3])
            return tuple(x.transpose(1, 2) for x in (out, *gradients))

        yield call


def check(name: str, came: Any, due: Any) -> None:
    """Compare this rank's results with its share of the one-GPU results."""
    came, due = ((x,) if isinstance(x, torch.Tensor) else x for x in (came, due))
    for each, x, whole in zip(NAMES, came, due, strict=False):
        mine = ringcore.shard(whole, "zigzag", dist.get_rank(), SIZE, axis=1).detach()
        error = float((x.detach().float() - mine.float()).abs().max() / mine.float().abs().max())
        if not error < 0.03:
            raise ValueError(f"{name}: {each} is off by {error}")


def run(length: int, rounds: int, results: list[dict[str, Any]]) -> None:
    rank = dist.get_rank()
    *arrays, dout = draw(length)
    calls = max(3, min(20, 20 * 32768 // length))
    shards = [ringcore.shard(x, "zigzag", rank, SIZE, axis=1).contiguous() for x in (*arrays, dout)]

    def ring(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ringcore.ring_attention(
            q, k, v, ring=dist.group.WORLD, layout="zigzag", causal=True, axes="bshd"
        )
        return out

    def plain(attend: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> Call:
        def call() -> torch.Tensor:
            with torch.no_grad():
                return attend(*given)

        return call

    sides: dict[str, dict[str, Call]] = {
        "forward": {"one GPU": plain(alone, arrays), "ring": plain(ring, shards[:3])},
        "forward and backward": {
            "one GPU": with_gradients(alone, arrays, dout),
            "ring": with_gradients(ring, shards[:3], shards[3]),
        },
    }
    for direction, these in sides.items():
        poison()
        due = these["one GPU"]()
        poison()
        check(f"{length} {direction}", these["ring"](), due)
    memory = {}
    for direction in sides:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = sides[direction]["ring"]()
        torch.cuda.synchronize()
        memory[direction] = torch.cuda.max_memory_allocated() - before
        del kept
    try:
        sides["forward"]["ring, graph"] = graphed(sides["forward"]["ring"])
        check(f"{length} graph", sides["forward"]["ring, graph"](), sides["forward"]["one GPU"]())
    except RuntimeError as exc:
        print(f"rank {rank}: no graph: {exc}", flush=True)
    for direction, these in sides.items():
        times: dict[str, list[float]] = {name: [] for name in these}
        for call in these.values():
            timed(call, 2)
        for turn in range(rounds):
            for name in list(these)[:: 1 if turn % 2 else -1]:
                times[name].append(timed(these[name], calls))
        medians = {name: statistics.median(found) for name, found in times.items()}
        report(results, length, direction, medians, memory[direction])
    for rotate in ("alltoall", "allgather"):
        for direction, these in sides.items():
            name = f"torch context_parallel, {rotate}"
            try:
                with context_parallel(rotate, arrays, None if direction == "forward" else dout) as call:
                    check(name, call(), these["one GPU"]())
                    timed(call, 2)
                    found = statistics.median(timed(call, calls) for _ in range(rounds))
                report(results, length, direction, {name: found}, None)
            except Exception as exc:
                print(f"rank {rank}: {name}, {direction}: {type(exc).__name__}: {exc}", flush=True)


def report(results: list[dict[str, Any]], length: int, direction: str, ms: dict[str, float], peak: int | None) -> None:
    found: dict[str, Any] = {"length": length, "direction": direction, "ms": ms}
    if "one GPU" in ms:
        ideal = ms["one GPU"] / SIZE
        found["of_ideal"] = {name: ideal / spent for name, spent in ms.items() if name != "one GPU"}
        found["peak_bytes_beyond_inputs"] = peak
        block = 2 * length // SIZE * HEADS * WIDTH * 2
        found["peak_in_visiting_blocks"] = None if peak is None else peak / block
    results.append(found)
    if dist.get_rank() == 0:
        shown = ", ".join(f"{name} {spent:.3f} ms" for name, spent in ms.items())
        part = ", ".join(f"{name} {value:.2f} of the ideal" for name, value in found.get("of_ideal", {}).items())
        print(f"{length} {direction}: {shown}; {part}; peak {found.get('peak_in_visiting_blocks')}", flush=True)


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    results: list[dict[str, Any]] = []
    for length in options.lengths:
        run(length, options.rounds, results)
    if dist.get_rank() == 0 and options.json:
        found = {
            "gpus": [torch.cuda.get_device_name(i) for i in range(SIZE)], "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(), "flash-attn-4": installed("flash-attn-4"),
            "command": " ".join(Path(word).name for word in sys.argv), "results": results,
        }  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
