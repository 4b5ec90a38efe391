"""What `test_launch_gpus.py` starts: ``python gpu_scenarios.py <name> <carrier>``. Each prints lines for each rank."""

import os
import sys
import time

import scenes
import torch
import torch.distributed as dist
from scenes import say

import ringcore
from ringcore.tile import ReferenceKernels
from ringcore_torch import TorchTransport

RANK = int(os.environ["RANK"])


class Failing(scenes.Failing):
    """Kernels that fail when all other ranks have long given their GPUs what they have to do."""

    def _count(self, direction):
        try:
            super()._count(direction)
        except ZeroDivisionError:
            time.sleep(1)
            raise


class Sleeping(scenes.Failing):
    """Kernels that do not fail, but take long."""

    def _count(self, direction):
        try:
            super()._count(direction)
        except ZeroDivisionError:
            time.sleep(12)


def tensors():
    generator = torch.Generator().manual_seed(RANK)
    return [torch.randn(1, 2, 256, 32, generator=generator).cuda().requires_grad_() for _ in range(3)]


def begin(carrier, timeout):
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")
    return TorchTransport(dist.group.WORLD, carrier=carrier, timeout=timeout)


def attempt(call):
    """Run it, and say how it ended and whether it took long; what the GPU itself reports counts too."""
    start = time.monotonic()
    try:
        scenes.attempt(RANK, call)
    except RuntimeError as error:
        say(f"rank {RANK}: {type(error).__name__}: {str(error).splitlines()[0]}")
    say(f"rank {RANK}: {'long' if time.monotonic() - start > 20 else 'soon'}")


def backward_with(kernels, ring):
    """Rank 1's gradients never leave it in time, so that rank 0's stream waits for them."""
    given = tensors()
    out = ringcore.ring_attention(*given, ring=ring)  # makes the connections
    torch.cuda.synchronize()
    out = ringcore.ring_attention(*given, ring=ring, kernels=kernels(ReferenceKernels(), RANK == 1, "backward"))
    attempt(lambda: out.sum().backward())
    attempt(torch.cuda.synchronize)
    attempt(lambda: ringcore.ring_attention(*given, ring=ring))
    attempt(lambda: ringcore.ring_attention(*given, ring=ring))
    return given


def fails(carrier):
    given = backward_with(Failing, begin(carrier, 60 if carrier == "nccl" else 10))
    if carrier == "nccl" and RANK == 0:
        say(f"rank 0: gradients that did not arrive are {'nan' if given[1].grad.isnan().any() else 'numbers'}")


def sleeps(carrier):
    backward_with(Sleeping, begin(carrier, 4))


def recovers(carrier):
    """The process goes on, over another group."""
    backward_with(Failing, begin(carrier, 60))
    dist.barrier()
    ring = TorchTransport(dist.new_group(), carrier=carrier, timeout=60)
    given = tensors()
    attempt(lambda: ringcore.ring_attention(*given, ring=ring).sum().backward())
    attempt(torch.cuda.synchronize)
    say(f"rank {RANK}: {'nan' if any(x.grad.isnan().any() for x in given) else 'numbers'}")


def leaves(carrier):
    """Without a word to anybody: rank 1's process ends while rank 0 works on."""
    ring = begin(carrier, 10)
    given = tensors()
    ringcore.ring_attention(*given, ring=ring)
    torch.cuda.synchronize()
    if RANK == 1:
        os._exit(0)
    attempt(lambda: ringcore.ring_attention(*given, ring=ring))
    os._exit(0)  # torch.distributed may wait at its end for the process that is gone


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    say(f"rank {RANK}: ends")
