"""Two GPUs: the ring against the best installed kernel on one GPU, whose time / 2 is the ideal, and against other rings.

    torchrun --nproc-per-node 2 tests/benchmarks/ring_gpu.py [--json FILE] [--lengths 8192 32768 131072]

bfloat16, 16 heads of 128, causal, zigzag, random data. Each figure is the time between two CUDA events around queued
calls, divided by their number; the slower rank counts. Sides take turns; medians over the rounds are reported. Results
are compared with the one-GPU kernel's before anything is timed, in memory that was filled with NaN. Peak memory is
that of the caching allocator and of symmetric memory, less inputs and outputs, over the bound of `memory_bound.due`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import gpu
import memory_bound
import torch
import torch.distributed as dist
from gpu import Attend, Call, check, in_turns, poison, timed, with_gradients, without_gradients
from graphs import graphed
from peers import context_parallel, ring_flash_attn

import ringcore

SIZE = 2
DIRECTIONS = ("forward", "forward and backward")
PEER = "ring-flash-attn zigzag, on torch's FlashAttention-2"


class Problem:
    """Arrays of one length, whole and this rank's, and what one GPU makes of them."""

    def __init__(self, length: int) -> None:
        self.length = length
        *self.arrays, self.dout = gpu.draw(length)
        *self.shards, self.dout_shard = (self.mine(x).contiguous() for x in (*self.arrays, self.dout))
        self.calls = max(3, min(20, 20 * 32768 // length))
        self.best, self.attend = gpu.best()
        self.alone = self.both(self.attend, self.arrays, self.dout)

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of x [B, S, H, D]."""
        part: torch.Tensor = ringcore.shard(x, "zigzag", dist.get_rank(), SIZE, axis=1)
        return part

    def sharded(self, attend: Attend) -> dict[str, Call]:
        """Calls of a ring's attention on this rank's part."""
        return self.both(attend, self.shards, self.dout_shard)

    def both(self, attend: Attend, arrays: list[torch.Tensor], dout: torch.Tensor) -> dict[str, Call]:
        """For each direction a call."""
        calls = without_gradients(attend, arrays), with_gradients(attend, arrays, dout)
        return dict(zip(DIRECTIONS, calls, strict=True))

    def due(self, direction: str) -> list[torch.Tensor]:
        """This rank's share of what one GPU finds."""
        found = self.alone[direction]()
        return [self.mine(x).clone() for x in ((found,) if isinstance(found, torch.Tensor) else found)]


def ring_of(group: Any) -> Attend:
    """ringcore's attention over the group."""
    return lambda q, k, v: ringcore.ring_attention(q, k, v, ring=group, layout="zigzag", causal=True, axes="bshd")


def memory_of(problem: Problem, ring: dict[str, Call], peer: list[int]) -> dict[str, dict[str, Any]]:
    """For each direction the peak beyond inputs and outputs, and its bound; ``peer`` grows as the ring takes memory."""
    workspace = memory_bound.workspace_of(problem.attend, problem.shards, problem.dout_shard)
    due = memory_bound.due(problem.length // SIZE, workspace)
    found = {}
    for direction in DIRECTIONS:
        ring[direction]()  # takes the ring's memory, and whatever else a first call does
        peak, outputs = memory_bound.peak_of(ring[direction])
        bytes_taken = peak - outputs + sum(peer)
        found[direction] = {
            "bytes": bytes_taken, "of_which_symmetric_memory": sum(peer), "outputs_not_counted": outputs,
            "bound": due[direction], "workspace_measured_on": problem.best,
            "of_bound": bytes_taken / sum(due[direction].values()),
        }  # fmt: skip
    return found


def run(length: int, rounds: int, peer_attend: Attend | None) -> list[dict[str, Any]]:
    """What was found at this length, for each direction."""
    problem = Problem(length)
    group = dist.new_group(list(range(SIZE)))  # a ring of its own, so that all of its memory is this length's
    ring = problem.sharded(ring_of(group))
    explained = ringcore.explain(
        *problem.shards, wrt=("q", "k", "v"), ring=group, layout="zigzag", causal=True, axes="bshd"
    )
    with memory_bound.peer_memory() as peer:
        memory = memory_of(problem, ring, peer)
    results = []
    for direction in DIRECTIONS:
        sides = {"one GPU": problem.alone[direction], "ring": ring[direction]}
        if peer_attend is not None:
            sides[PEER] = problem.sharded(peer_attend)[direction]
        due = problem.due(direction)
        for name in list(sides)[1:]:
            checked(name, sides[name], due)
        if direction == "forward":
            add_graph(problem, direction, sides, due)
        ms = in_turns(sides, problem.calls, rounds)
        for rotate in ("alltoall", "allgather"):
            ms.update(time_context_parallel(problem, direction, rotate, rounds, due))
        results.append(
            {
                "length": length, "direction": direction, "one_gpu": problem.best, "ms": ms, "of_ideal": of_ideal(ms),
                "kernels": explained.kernels, "blocks": explained.ring, "memory": memory[direction],
            }
        )  # fmt: skip
        say(results[-1])
    return results


def checked(name: str, call: Call, due: list[torch.Tensor]) -> None:
    """Compare the call's results, in memory that was full of NaN."""
    poison()
    check(name, call(), due)


def add_graph(problem: Problem, direction: str, sides: dict[str, Call], due: list[torch.Tensor]) -> bool:
    """Add the ring's call as a graph to the sides, if it can be captured; it has a ring of its own."""
    ring = problem.sharded(ring_of(dist.new_group(list(range(SIZE)))))
    try:
        call = graphed(ring[direction])
    except RuntimeError as exc:
        if dist.get_rank() == 0:
            print(f"{problem.length} {direction}: {exc}", flush=True)
        return False
    checked("ring, graph", call, due)
    sides["ring, graph"] = call
    return True


def time_context_parallel(
    problem: Problem, direction: str, rotate: str, rounds: int, due: list[torch.Tensor]
) -> dict[str, float]:
    """The milliseconds of torch's own ring in one of its modes, by its name; none if it failed."""
    name = f"torch context_parallel, {rotate}"
    try:
        with context_parallel(rotate, problem.arrays, None if direction == "forward" else problem.dout) as call:
            checked(name, call, due)
            timed(call, 2)
            return {name: statistics.median(timed(call, problem.calls) for _ in range(rounds))}
    except Exception as exc:
        print(f"rank {dist.get_rank()}: {name}, {direction}: {type(exc).__name__}: {exc}", flush=True)
        return {}


def run_graph(length: int, rounds: int) -> dict[str, Any] | None:
    """Forward and backward in one graph; None if that cannot be captured."""
    problem, direction = Problem(length), DIRECTIONS[1]
    sides = {"one GPU": problem.alone[direction]}
    if not add_graph(problem, direction, sides, problem.due(direction)):
        return None
    ms = in_turns(sides, problem.calls, rounds)
    found = {
        "length": length, "direction": direction, "one_gpu": problem.best, "ms": ms, "of_ideal": of_ideal(ms)
    }  # fmt: skip
    say(found)
    return found


def of_ideal(ms: dict[str, float]) -> dict[str, float]:
    """Half of one GPU's time over each other side's."""
    return {name: ms["one GPU"] / SIZE / spent for name, spent in ms.items() if name != "one GPU"}


def say(found: dict[str, Any]) -> None:
    """One line for each side, and one for memory, by rank 0."""
    if dist.get_rank() != 0:
        return
    ms = found["ms"]
    print(f"{found['length']} {found['direction']}: one GPU, {found['one_gpu']}, {ms['one GPU']:.3f} ms", flush=True)
    for name, share in found["of_ideal"].items():
        print(f"    {name}: {ms[name]:.3f} ms, {share:.2f} of the ideal", flush=True)
    if "memory" in found:
        memory = found["memory"]
        bound = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in memory["bound"].items())
        print(
            f"    memory: {memory['bytes'] / 1e6:.1f} MB, {memory['of_which_symmetric_memory'] / 1e6:.1f} of it "
            f"symmetric; {memory['of_bound']:.2f} of the bound ({bound}); kernels {found['kernels']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    options = parser.parse_args()
    start = time.monotonic()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    path = options.json if dist.get_rank() == 0 else None
    try:
        peer = ring_flash_attn()
    except ImportError as exc:
        peer = None
        if dist.get_rank() == 0:
            print(f"{PEER}: left out: {exc}", flush=True)
    results: list[dict[str, Any]] = []
    for length in options.lengths:
        results += run(length, options.rounds, peer)
        gpu.save(path, SIZE, results)
    for length in options.lengths:  # last: a capture that fails may leave the device in disorder
        found = run_graph(length, options.rounds)
        if found is None:
            break
        results.append(found)
        gpu.save(path, SIZE, results)
    if dist.get_rank() == 0:
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
