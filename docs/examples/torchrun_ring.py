"""Exact attention and its gradients over a ring of processes, compared with dense attention in one.

    torchrun --nproc-per-node 4 docs/examples/torchrun_ring.py [--backend gloo | nccl] [--carrier peer_memory | nccl]

Every rank draws the same whole q, k and v, keeps its own rows, and computes attention and gradients over the ring. The
largest differences to dense attention in float64 are printed. With gloo the tensors are in host memory. With NCCL each
rank has a GPU; the ring then takes the GPUs' memory, or NCCL's messages where that does not reach, or the carrier that
is asked for. Without --backend it is NCCL where every rank on this machine has a GPU.
"""

import argparse
import os

import torch
import torch.distributed as dist

import ringcore
from ringcore_torch import TorchTransport

HEADS, LENGTH, WIDTH = 4, 1000, 64
LAYOUT = "zigzag"


def begin(backend):
    """Initialise the world; this rank's device."""
    if backend == "gloo":
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    return device


def dense(q, k, v):
    """Causal attention as one softmax over whole rows."""
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / WIDTH**0.5).masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1) @ v


def main():
    """Attend over the ring, go backward, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="nccl" if gpus else "gloo")
    parser.add_argument("--carrier", choices=("peer_memory", "nccl"))
    options = parser.parse_args()
    device = begin(options.backend)
    ring = TorchTransport(dist.group.WORLD, carrier=options.carrier)  # dist.group.WORLD itself, if there is no choice
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, HEADS, LENGTH, WIDTH, generator=generator).to(device) for _ in range(4)]

    *inputs, dout = (ringcore.shard(x, LAYOUT, rank, size) for x in whole)  # [1, HEADS, this rank's rows, WIDTH]
    inputs = [x.requires_grad_() for x in inputs]
    out = ringcore.ring_attention(*inputs, ring=ring, layout=LAYOUT, causal=True)
    out.backward(dout)

    *exact, exact_dout = (x.double().requires_grad_() for x in whole)
    exact_out = dense(*exact)
    exact_out.backward(exact_dout.detach())
    pairs = {"out": (out, exact_out)}
    pairs |= {f"d{name}": (x.grad, y.grad) for name, x, y in zip("qkv", inputs, exact, strict=True)}
    largest = [
        (ringcore.shard(due.detach(), LAYOUT, rank, size) - came.detach()).abs().max() for came, due in pairs.values()
    ]
    largest = torch.stack(largest)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if rank == 0:
        text = ", ".join(f"{name} {value:.1e}" for name, value in zip(pairs, largest.tolist(), strict=True))
        print(f"{size} ranks over {dist.get_backend()}, largest differences to dense attention: {text}")
        print(ring.explain)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
