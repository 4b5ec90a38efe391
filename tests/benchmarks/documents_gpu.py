"""Packed documents on two GPUs: ringcore against the best modes of torch and of ring-flash-attn, and the kernel alone.

    torchrun --nproc-per-node 2 tests/benchmarks/documents_gpu.py [--json FILE] [--length 131072] [--seeds 0 1 2]

bfloat16, 16 heads of 128, causal within documents of log-normal lengths, 64 to 32k, random data. Documents end at
multiples of 4, without which the modes that cut each document for two ranks refuse them; every side gets the same
ones. Each figure is the time between two CUDA events around queued calls, divided by their number; the slower rank
counts, sides take turns, and medians over the rounds are reported. In memory that was filled with NaN every side's out
and gradients are first compared with those of cuDNN on one GPU, document by document.

"rate" is in visible pairs, times heads, per second on both GPUs; "of dense" is over twice that of flash-attn-4 for one
causal sequence of this length on one GPU, or of cuDNN where flash-attn-4 is not installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu
import packed_peers
import torch
import torch.distributed as dist
from gpu import HEADS, Attend, Call, Tensor, check, in_turns, poison, with_gradients, without_gradients
from packed import log_normal_documents

import ringcore

SIZE = 2


class Documents:
    """Arrays of one sequence of documents, and what cuDNN finds for each document by itself."""

    def __init__(self, length: int, seed: int) -> None:
        self.seed = seed
        self.ends = sorted({end // 4 * 4 for end in log_normal_documents(seed, length)})
        *self.arrays, self.dout = gpu.draw(length)
        self.pairs = sum((stop - start) * (stop - start + 1) // 2 for start, stop in pairwise(self.ends))
        self.due = with_gradients(self._one_by_one, self.arrays, self.dout)()

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = gpu.aten("CUDNN_ATTENTION")
        return torch.cat([attend(*(x[:, a:b] for x in (q, k, v))) for a, b in pairwise(self.ends)], 1)

    def calls(self, attend: Attend, mine: Callable[[Tensor], Tensor]) -> tuple[Call, Call]:
        """Without and with gradients, on the rows that ``mine`` takes."""
        shards = [mine(x).contiguous() for x in self.arrays]
        return without_gradients(attend, shards), with_gradients(attend, shards, mine(self.dout).contiguous())


def ours(problem: Documents) -> tuple[Attend, Callable[[Tensor], Tensor]]:
    """ringcore over both GPUs, in the layout that is balanced for these documents."""
    packed = ringcore.Documents.from_cu_seqlens(problem.ends)
    layout = ringcore.balanced(problem.ends[-1], SIZE, causal=True, documents=packed)
    rank, group = dist.get_rank(), dist.new_group(list(range(SIZE)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ringcore.ring_attention(
            q, k, v, ring=group, layout=layout, causal=True, documents=packed, axes="bshd"
        )
        return out

    return attend, lambda x: ringcore.shard(x, layout, rank, SIZE, axis=1)


def alone(problem: Documents) -> Iterator[tuple[str, Attend]]:
    """What one GPU does with all of it."""
    packed = ringcore.Documents.from_cu_seqlens(problem.ends)
    yield (
        "one GPU, ringcore",
        lambda q, k, v: ringcore.ring_attention(q, k, v, causal=True, documents=packed, axes="bshd"),
    )
    varlen = packed_peers.flash4(problem.ends)
    if varlen is not None:
        yield "one GPU, flash-attn-4 varlen", varlen


def run(length: int, seed: int, rounds: int, dense: dict[str, float]) -> list[dict[str, Any]]:
    """What was found for these documents, for each direction."""
    problem = Documents(length, seed)
    sides: dict[str, tuple[Attend, Callable[[Tensor], Tensor]]] = {"ringcore": ours(problem)}
    failed: dict[str, str] = {}
    for name, make in packed_peers.RINGS.items():
        try:
            sides[name] = make(problem.ends)
        except Exception as exc:
            failed[name] = f"{type(exc).__name__}: {exc}"
    sides.update({name: (attend, lambda x: x) for name, attend in alone(problem)})
    calls: dict[str, tuple[Call, Call]] = {}
    for name, (attend, mine) in sides.items():
        try:
            both = problem.calls(attend, mine)
            poison()
            check(name, both[0](), mine(problem.due[0]))
            poison()
            check(name, both[1](), [mine(x) for x in problem.due])
            calls[name] = both
        except Exception as exc:
            if name == "ringcore":
                raise
            failed[name] = f"{type(exc).__name__}: {exc}"[:300]
    common = agreed(calls)
    results = []
    for place, direction in enumerate(("forward", "forward and backward")):
        ms = in_turns({name: calls[name][place] for name in common}, 5, rounds)
        rates = {
            name: problem.pairs * HEADS / spent / 1e6 for name, spent in ms.items() if not name.startswith("one GPU")
        }
        peers = {name: rate for name, rate in rates.items() if name != "ringcore"}
        best = max(peers, key=peers.__getitem__) if peers else None
        results.append({
            "seed": seed, "documents": len(problem.ends) - 1, "longest": max(b - a for a, b in pairwise(problem.ends)),
            "pairs": problem.pairs, "direction": direction, "ms": ms, "giga_pairs_per_second": rates,
            "best_peer": best, "over_best_peer": rates["ringcore"] / peers[best] if best else None,
            "of_dense": rates["ringcore"] / dense[direction], "failed": failed,
        })  # fmt: skip
    backward = [found["ms"]["ringcore"] for found in results]
    results[1]["of_dense_backward_alone"] = (
        problem.pairs * HEADS / (backward[1] - backward[0]) / 1e6 / dense["backward alone"]
    )
    say(results)
    return results


def agreed(calls: dict[str, tuple[Call, Call]]) -> list[str]:
    """The names that no rank lacks."""
    names: list[Any] = [None] * SIZE
    dist.all_gather_object(names, sorted(calls))
    return [name for name in calls if all(name in each for each in names)]


def dense_rates(length: int, rounds: int) -> dict[str, float]:
    """Twice the rate of the best kernels on one GPU for one causal sequence, by direction."""
    *arrays, dout = gpu.draw(length)
    _, attend = gpu.best()
    sides = {"forward": without_gradients(attend, arrays), "both": with_gradients(attend, arrays, dout)}
    ms = in_turns(sides, 3, rounds)
    pairs = SIZE * HEADS * length * (length + 1) / 2 / 1e6
    return {
        "forward": pairs / ms["forward"],
        "forward and backward": pairs / ms["both"],
        "backward alone": pairs / (ms["both"] - ms["forward"]),
    }


def say(results: list[dict[str, Any]]) -> None:
    """A line for each side, by rank 0."""
    if dist.get_rank() != 0:
        return
    for found in results:
        print(f"seed {found['seed']}, {found['documents']} documents, {found['direction']}:", flush=True)
        for name, spent in found["ms"].items():
            print(f"    {name}: {spent:.3f} ms", flush=True)
        over = found["over_best_peer"]
        print(f"    over the best peer {over and round(over, 2)}, of dense {found['of_dense']:.3f}", flush=True)
        if "of_dense_backward_alone" in found:
            print(f"    backward alone, of dense {found['of_dense_backward_alone']:.3f}", flush=True)
    for name, why in results[0]["failed"].items():
        print(f"    left out: {name}: {why}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    start = time.monotonic()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    path = options.json if dist.get_rank() == 0 else None
    dense = dense_rates(options.length, options.rounds)
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        results += run(options.length, seed, options.rounds, dense)
        gpu.save(path, SIZE, {"dense_giga_pairs_per_second": dense, "documents": results})
    if dist.get_rank() == 0:
        for direction in ("forward", "forward and backward"):
            found = [each for each in results if each["direction"] == direction]
            print(f"{direction}: of dense, median {statistics.median(each['of_dense'] for each in found):.3f}")
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
