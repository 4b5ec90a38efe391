"""Decoding over a cache on two GPUs against the best of one.

    python -m torch.distributed.run --nproc-per-node 2 tests/benchmarks/decode_gpu.py [--json FILE]

One query for each sequence, 64 heads over 8 of k and v, 128 wide, bfloat16, random data: one sequence of 1M cached
positions, or several of fewer. On one GPU: `decode_attention` without a ring, and Torch's attention by cuDNN and by
FlashAttention-2. On two each has half of the positions. Every result is first compared with attention in float64.
"of due" is the time on two GPUs over half of the best on one (1.3 is asked for); "bandwidth" what is read of k and v
in that time on each GPU, over what a sum of as many numbers reads. "graph": the call is captured once and replayed.
"host" is how long a call that is not keeps the host.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu import DEVICE, Call, Tensor, in_turns, poison, save
from graphs import graphed

import ringcore

HEADS, KEY_HEADS, WIDTH = 64, 8, 128
CASES = ((1, 1 << 20), (4, 1 << 18), (16, 1 << 16))  # sequences, cached positions of each


def draw(batch: int, length: int) -> list[Tensor]:
    """q, k and v [B, H, S, D], equal in every process."""
    generator = torch.Generator(DEVICE).manual_seed(batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    return [normal(batch, HEADS, 1, WIDTH), *(normal(batch, KEY_HEADS, length, WIDTH) for _ in range(2))]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float64, one head of k and v at a time."""
    found = []
    for entry in range(k.shape[0]):
        for head, some in enumerate(q[entry].double().unflatten(0, (KEY_HEADS, -1))):
            scores = some[:, 0] @ k[entry, head].double().T / WIDTH**0.5
            found.append(torch.softmax(scores, -1) @ v[entry, head].double())
    return torch.stack(found).view(q.shape)


def check(name: str, came: Tensor, due: Tensor) -> float:
    """The largest error over the largest number due; raises ValueError if it is no rounding of bfloat16."""
    error = float((came.double() - due).abs().max() / due.abs().max())
    if not error < 0.01:
        raise ValueError(f"{name} is off by {error} of the largest number")
    return error


def torch_side(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Torch's attention by these kernels."""
    only = getattr(torch.nn.attention.SDPBackend, backend)

    def call() -> Tensor:
        with torch.nn.attention.sdpa_kernel(only):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return call


def host_time(call: Call, calls: int = 20) -> float:
    """Microseconds until a call returns, with nothing queued before."""
    spent = []
    for _ in range(calls):
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return sorted(spent)[calls // 2] * 1e6


def measured(batch: int, length: int, rank: int, size: int, rounds: int) -> dict[str, Any]:
    """One line of the results."""
    q, k, v = draw(batch, length)
    due = dense(q, k, v)
    mine = [ringcore.shard(x, "contiguous", rank, size).contiguous() for x in (k, v)]
    group = dist.group.WORLD
    sides: dict[str, Call] = {
        "ringcore, one": lambda: ringcore.decode_attention(q, k, v)[0],
        "cuDNN": torch_side("CUDNN_ATTENTION", q, k, v),
        "FlashAttention-2": torch_side("FLASH_ATTENTION", q, k, v),
        "ringcore, ring": lambda: ringcore.decode_attention(q, *mine, ring=group)[0],
    }
    sides["ringcore, ring, graph"] = graphed(sides["ringcore, ring"])
    errors = {}
    for name in list(sides):
        poison()
        try:
            errors[name] = check(name, sides[name](), due)
        except RuntimeError as error:
            if name.startswith("ringcore"):
                raise
            print(f"{name} does not run: {str(error).splitlines()[0]}", flush=True)
            del sides[name]
    sides["read"] = lambda: torch.sum(k, dtype=torch.float32)
    times = in_turns(sides, 20, rounds)
    read = k.nbytes / times.pop("read")
    best = min((name for name in times if ", ring" not in name), key=times.__getitem__)
    rings = {name: spent for name, spent in times.items() if ", ring" in name}
    return {
        "sequences": batch, "positions": length, "milliseconds": times, "best of one": best,
        "of due": {name: spent / (times[best] / size) for name, spent in rings.items()},
        "bandwidth": {name: sum(x.nbytes for x in mine) / spent / read for name, spent in rings.items()},
        "read TB/s": read / 1e9, "host microseconds": host_time(sides["ringcore, ring"]), "errors": errors,
        "kernels": ringcore.explain(q, *mine).kernels, "ring": ringcore.explain(q, *mine, ring=group).ring,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    lines = []
    for batch, length in CASES:
        lines.append(measured(batch, length, rank, size, options.rounds))
        if rank == 0:
            print(lines[-1], flush=True)
    if rank == 0:
        save(options.json, size, lines)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
