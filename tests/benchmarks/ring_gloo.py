"""A gloo ring of 2 ranks with one thread each, against torch's attention in one process with two threads.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/ring_gloo.py [--quick] [--json FILE]

Both sides run in turn, in an order that alternates, while the other rank sleeps. Each round gives one ratio; the median
is reported. A time above 1 means that the ring takes longer. Every timed result is compared with torch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kernels_cpu import error_of, processor
from torch.nn.functional import scaled_dot_product_attention

import ringcore

LAYOUTS = {False: "contiguous", True: "zigzag"}


def gathered(x: Any) -> list[Any]:
    """Every rank's object."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def timed(call: Callable[[], Any], everywhere: bool) -> tuple[float, Any]:
    """Seconds of the slowest rank, and this rank's result; what runs on rank 0 alone is called there alone."""
    time.sleep(0.02)  # OpenMP's threads spin for a while after torch's calls, on the cores of the next side
    torch.set_num_threads(1 if everywhere else 2)
    dist.barrier()
    start = time.perf_counter()
    result = call() if everywhere or dist.get_rank() == 0 else None
    seconds = time.perf_counter() - start
    return max(gathered(seconds)) if everywhere else gathered(seconds)[0], result


def sides(length: int, causal: bool, direction: str) -> dict[str, tuple[Callable[[], Any], bool]]:
    """What is timed, by name, and whether every rank takes part; each returns (out,) or (dq, dk, dv)."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 8, length, 64, generator=generator) for _ in range(4)]
    mine = [ringcore.shard(x, LAYOUTS[causal], dist.get_rank(), dist.get_world_size()) for x in whole]
    ring = dist.group.WORLD

    def attended(attend: Callable[..., Any], arrays: list[Any]) -> Callable[[], Any]:
        given = [x.requires_grad_(direction != "forward") for x in arrays[:3]]

        def call() -> Any:
            out = attend(*given)
            return (out.detach(),) if direction == "forward" else torch.autograd.grad(out, given, arrays[3])

        return call

    def over_the_ring(q: Any, k: Any, v: Any) -> Any:
        return ringcore.ring_attention(q, k, v, ring=ring, causal=causal, layout=LAYOUTS[causal])

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return {"ring": (attended(over_the_ring, mine), True), "torch": (attended(theirs, whole), False)}


def measure(length: int, causal: bool, direction: str, rounds: int) -> dict[str, Any]:
    """Median seconds of each side, and the ring's time over torch's."""
    calls = sides(length, causal, direction)
    times: dict[str, list[float]] = {name: [] for name in calls}
    error = 0.0
    for number in range(rounds + 1):  # the first only warms up
        results = {}
        for name in sorted(calls, reverse=bool(number % 2)):
            seconds, results[name] = timed(*calls[name])
            if number:
                times[name].append(seconds)
        parts = gathered(results["ring"])
        if dist.get_rank() == 0:
            joined = [ringcore.unshard(part, LAYOUTS[causal]) for part in zip(*parts, strict=True)]
            for came, due in zip(joined, results["torch"], strict=True):
                error = max(error, error_of(came.numpy(), due))
    if error > 1e-4:
        sys.exit(f"length {length}, {direction}: the ring differs from torch by {error}")
    ratios = [ours / theirs for ours, theirs in zip(times["ring"], times["torch"], strict=True)]
    return {
        "length": length,
        "causal": causal,
        "direction": direction,
        "rounds": rounds,
        "milliseconds": {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        "ring_time_over_torch": statistics.median(ratios),
        "smallest_and_largest": [min(ratios), max(ratios)],
        "largest_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short length and few rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements there")
    parser.add_argument("--rounds", type=int, help="rounds per measurement (default 9)")
    chosen = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    if dist.get_world_size() != 2:
        sys.exit(f"this compares 2 ranks with 2 threads, but {dist.get_world_size()} ranks were started")
    results = []
    for causal in (False, True):
        for direction in ("forward", "forward and backward"):
            rounds = chosen.rounds or (2 if chosen.quick else 9)
            results.append(measure(512 if chosen.quick else 8192, causal, direction, rounds))
            if dist.get_rank() == 0:
                print(json.dumps(results[-1]), flush=True)
    if chosen.json and dist.get_rank() == 0:
        head = {"cpu": processor(), "torch": torch.__version__}
        head["command"] = "OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/ring_gloo.py --json FILE"
        chosen.json.write_text(json.dumps({**head, "results": results}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
