"""Exact attention and its gradients over a ring of processes, compared with dense attention in one.

    torchrun --nproc-per-node 4 docs/examples/torchrun_gloo.py

Every rank draws the same whole q, k and v, keeps its own rows, and computes attention and gradients over the ring. The
largest differences to dense attention in float64 are printed. Where every rank has a GPU the group is made with NCCL.
"""

import os

import torch
import torch.distributed as dist

import ringcore

HEADS, LENGTH, WIDTH = 4, 1000, 64
LAYOUT = "zigzag"


def begin():
    """The world's process group, and this rank's device."""
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return dist.group.WORLD, device


def dense(q, k, v):
    """Causal attention as one softmax over whole rows."""
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / WIDTH**0.5).masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1) @ v


def main():
    """Attend over the ring, go backward, and compare."""
    ring, device = begin()
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
