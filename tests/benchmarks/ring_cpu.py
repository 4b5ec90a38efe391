"""An MPI ring of 2 ranks with one thread each, against one process with two threads: ringcore's and torch's.

    mpiexec -n 2 python tests/benchmarks/ring_cpu.py [--quick] [--json FILE]

All sides run in turn, in an order that rotates, while the other rank sleeps. Each round gives one ratio to the ring; the
median is reported. A time above 1 means that the ring takes longer. Every timed result is compared with torch's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from kernels_cpu import error_of, processor
from mpi4py import MPI

import ringcore
from ringcore_mpi import MpiTransport
from ringcore_numpy import NumpyKernels

WORLD = MPI.COMM_WORLD
LAYOUTS = {False: "contiguous", True: "zigzag"}


def quietly_wait() -> None:
    """A barrier that leaves the core to others; MPI's own spins."""
    request = WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.0005)


def timed(call: Callable[[], Any], everywhere: bool) -> tuple[float, Any]:
    """Seconds of the slowest rank, and this rank's result; what runs on rank 0 alone is called there alone."""
    quietly_wait()
    time.sleep(0.02)  # OpenMP's threads spin for a while after torch's calls, on the cores of the next side
    WORLD.Barrier() if everywhere else None
    start = time.perf_counter()
    result = call() if everywhere or WORLD.rank == 0 else None
    seconds = time.perf_counter() - start
    quietly_wait()
    return (max(WORLD.allgather(seconds)) if everywhere else WORLD.bcast(seconds)), result


def sides(length: int, causal: bool, direction: str) -> dict[str, tuple[Callable[[], Any], bool]]:
    """What is timed, by name, and whether every rank takes part; each returns out or (dq, dk, dv)."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 8, length, 64)).astype("float32") for _ in range(4))
    layout = LAYOUTS[causal]
    mine = [ringcore.shard(x, layout, WORLD.rank, WORLD.size) for x in (q, k, v, dout)]
    one, two = NumpyKernels(1), NumpyKernels(2)
    rings = {"window": MpiTransport(WORLD), "messages": MpiTransport(WORLD, shared=False)}
    whole = [torch.from_numpy(x).requires_grad_(direction != "forward") for x in (q, k, v)]

    def ring(transport: MpiTransport) -> Callable[[], Any]:
        where = {"ring": transport, "layout": layout, "kernels": one}
        return lambda: both(mine, where)

    def both(arrays: list[np.ndarray], where: dict[str, Any]) -> Any:
        if direction == "forward":
            return ringcore.ring_attention(*arrays[:3], causal=causal, **where)
        return ringcore.ring_attention_vjp(*arrays[:3], causal=causal, **where)[1](arrays[3])

    def theirs() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=causal)
        return out if direction == "forward" else torch.autograd.grad(out, whole, torch.from_numpy(dout))

    return {
        **{f"ring, {name}": (ring(transport), True) for name, transport in rings.items()},
        "one process": (lambda: both([q, k, v, dout], {"kernels": two}), False),
        "torch": (theirs, False),
    }


def joined(result: Any, layout: str) -> Any:
    """Every rank's shards as whole arrays."""
    parts = result if isinstance(result, tuple) else (result,)
    whole = tuple(ringcore.unshard(WORLD.allgather(x), layout) for x in parts)
    return whole if isinstance(result, tuple) else whole[0]


def measure(length: int, causal: bool, direction: str, rounds: int) -> dict[str, Any]:
    """Median seconds of each side, and the ring's time over each other side's."""
    calls = sides(length, causal, direction)
    names, times, errors = list(calls), {name: [] for name in calls}, dict.fromkeys(calls, 0.0)
    for number in range(rounds + 1):  # the first only warms up
        results = {}
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            seconds, result = timed(*calls[name])
            results[name] = joined(result, LAYOUTS[causal]) if calls[name][1] else result
            if number:
                times[name].append(seconds)
        if WORLD.rank == 0:
            for name in names:
                errors[name] = max(errors[name], difference(results[name], results["torch"]))
    if WORLD.rank == 0 and max(errors.values()) > 1e-4:
        sys.exit(f"length {length}, {direction}: results differ from torch's by {errors}")
    ring = names[0]
    return {
        "length": length,
        "causal": causal,
        "direction": direction,
        "rounds": rounds,
        "milliseconds": {name: 1e3 * statistics.median(times[name]) for name in names},
        "ring_time_over": {
            name: statistics.median(a / b for a, b in zip(times[ring], times[name], strict=True)) for name in names[1:]
        },
        "largest_error": max(errors.values()),
    }


def difference(got: Any, want: Any) -> float:
    """The largest error of one or several arrays against torch's."""
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    arrays = [x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in got]
    return max(error_of(x, y) for x, y in zip(arrays, want, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short length and few rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements there")
    parser.add_argument("--rounds", type=int, help="rounds per measurement (default 9)")
    chosen = parser.parse_args()
    if WORLD.size != 2:
        sys.exit(f"this compares 2 ranks with 2 threads, but {WORLD.size} ranks were started: mpiexec -n 2")
    torch.set_num_threads(2)
    rounds = chosen.rounds or (2 if chosen.quick else 9)
    results = []
    for causal in (False, True):
        for direction in ("forward", "forward and backward"):
            found = measure(512 if chosen.quick else 8192, causal, direction, rounds)
            results.append(found)
            if WORLD.rank == 0:
                print(json.dumps(found), flush=True)
    if chosen.json and WORLD.rank == 0:
        head = {"cpu": processor(), "numpy": np.__version__, "torch": torch.__version__}
        head["mpi"] = MPI.Get_library_version().splitlines()[0].strip()
        head["command"] = "mpiexec -n 2 python tests/benchmarks/ring_cpu.py --json FILE"
        chosen.json.write_text(json.dumps({**head, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
