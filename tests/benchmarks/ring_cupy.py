"""Two GPUs under MPI: the ring on CuPy arrays against the ring on Torch tensors by the same kernels.

    mpiexec -n 2 python tests/benchmarks/ring_cupy.py [--json FILE] [--lengths 32768 131072] [--carrier ipc]

bfloat16, 16 heads of 128, causal, zigzag, random data. Both rings run in the same two processes, in turn; each figure is
the time between two CUDA events around queued calls, divided by their number, of the slower rank; medians over the
rounds. Results are compared in memory that was filled with NaN before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import Any

import cupy
import gpu
import torch
import torch.distributed as dist
from gpu import Call, check, in_turns, poison
from mpi4py import MPI

import ringcore

KERNELS = {"Torch": "torch.cuda.cudnn_frontend", "CuPy": "cupy.cuda.cudnn"}
DIRECTIONS = ("forward", "forward and backward")
COMM = MPI.COMM_WORLD
HOW: dict[str, Any] = {"layout": "zigzag", "causal": True, "axes": "bshd"}


def torch_calls(arrays: list[Any], dout: Any, group: Any) -> dict[str, Call]:
    """For each direction a call of the ring over torch.distributed."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        return ringcore.ring_attention(q, k, v, ring=group, kernels=KERNELS["Torch"], **HOW)

    return dict(
        zip(DIRECTIONS, (gpu.without_gradients(attend, arrays), gpu.with_gradients(attend, arrays, dout)), strict=True)
    )


def cupy_calls(arrays: list[Any], dout: Any, ring: Any) -> dict[str, Call]:
    """For each direction a call of the ring over MPI, on the same memory."""
    q, k, v, dout = (cupy.from_dlpack(x) for x in (*arrays, dout))
    keywords = {"ring": ring, "kernels": KERNELS["CuPy"], **HOW}

    def both() -> tuple[Any, ...]:
        (out, _), pullback = ringcore.ring_attention_vjp(q, k, v, **keywords)
        return out, *pullback(dout)

    return dict(zip(DIRECTIONS, (lambda: ringcore.ring_attention(q, k, v, **keywords), both), strict=True))


def tensors(found: Any) -> list[torch.Tensor]:
    """Results of either library as tensors."""
    return [torch.from_dlpack(x) for x in (found if isinstance(found, tuple) else (found,))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--carrier", choices=["ipc", "nccl", "mpi", "host"])
    options = parser.parse_args()
    torch.cuda.set_device(COMM.rank)
    cupy.cuda.Device(COMM.rank).use()
    begin_torch()
    ring = COMM if options.carrier is None else ring_by(options.carrier)
    results = []
    for length in options.lengths:
        *arrays, dout = (
            ringcore.shard(x, "zigzag", COMM.rank, COMM.size, axis=1).contiguous() for x in gpu.draw(length)
        )
        calls = {"Torch": torch_calls(arrays, dout, dist.group.WORLD), "CuPy": cupy_calls(arrays, dout, ring)}
        for direction in DIRECTIONS:
            sides = {name: found[direction] for name, found in calls.items()}
            due = [x.clone() for x in tensors(sides["Torch"]())]
            poison()
            check("CuPy", tensors(sides["CuPy"]()), due)
            ms = in_turns(sides, max(3, min(20, 20 * 32768 // length)), options.rounds)
            blocks = ringcore.explain(*map(cupy.from_dlpack, arrays), ring=ring, kernels=KERNELS["CuPy"], **HOW).ring
            results.append(
                {
                    "length": length, "direction": direction, "ms": ms, "cupy_over_torch": ms["CuPy"] / ms["Torch"],
                    "blocks": blocks,
                }
            )  # fmt: skip
            if COMM.rank == 0:
                print(
                    f"{length} {direction}: CuPy {ms['CuPy']:.3f} ms, Torch {ms['Torch']:.3f} ms, "
                    f"{ms['CuPy'] / ms['Torch']:.3f} ({blocks})",
                    flush=True,
                )
    if COMM.rank == 0:
        gpu.save(options.json, COMM.size, results)
    dist.destroy_process_group()


def ring_by(carrier: str) -> Any:
    """The ring whose blocks travel as asked for."""
    from ringcore_cupy import CupyTransport
    from ringcore_mpi import MpiTransport

    return CupyTransport(MpiTransport(COMM), carrier=carrier)


def begin_torch() -> None:
    """torch.distributed among the ranks of MPI."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = COMM.bcast(free.getsockname()[1])
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(COMM.rank), "WORLD_SIZE": str(COMM.size)}
    os.environ.update(where | {"LOCAL_RANK": str(COMM.rank)})
    dist.init_process_group("cpu:gloo,cuda:nccl")


if __name__ == "__main__":
    main()
