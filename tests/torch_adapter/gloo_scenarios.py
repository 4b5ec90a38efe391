"""What `test_launch_gloo.py` starts: ``python gloo_scenarios.py <name>``. Each prints one line for each rank."""

import os
import signal
import sys
import time

import scenes
import torch
import torch.distributed as dist
from scenes import say

import ringcore
from ringcore_torch import FlashCpu, TorchTransport, adapt

RANK = int(os.environ.get("RANK", "0"))


def begin():
    dist.init_process_group("gloo")
    return dist.group.WORLD


def tensors(length=64, heads=2, width=8):
    generator = torch.Generator().manual_seed(RANK)
    return [torch.randn(1, heads, length, width, generator=generator) for _ in range(3)]


def attempt(call):
    scenes.attempt(RANK, call)


def failing_on(rank, direction="forward"):
    return scenes.Failing(FlashCpu(), rank == RANK, direction)


def together():
    """Wait for all ranks of the world, by a message of the user's own."""
    dist.barrier()


def fine():
    world = begin()
    ringcore.ring_attention(*tensors(), ring=world)
    say(f"rank {RANK}: {adapt(world).explain}")


def not_initialised():
    begin()
    world = dist.group.WORLD
    ringcore.ring_attention(*tensors(), ring=world)
    dist.destroy_process_group()
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=world))
    attempt(lambda: TorchTransport(None))


def kernel_fails(length=64):
    world = begin()
    attempt(lambda: ringcore.ring_attention(*tensors(length), ring=world, kernels=failing_on(1)))
    attempt(lambda: ringcore.ring_attention(*tensors(length), ring=world))
    together()


def kernel_fails_with_large_messages():
    kernel_fails(length=20_000)


def kernel_fails_in_backward():
    world = begin()
    given = [x.requires_grad_() for x in tensors()]
    out = ringcore.ring_attention(*given, ring=world, kernels=failing_on(1, "backward"))
    attempt(lambda: out.sum().backward())
    attempt(lambda: ringcore.ring_attention(*given, ring=world))
    together()


def nobody_catches():
    ringcore.ring_attention(*tensors(), ring=begin(), kernels=failing_on(1))


def raises_alone():
    world = begin()
    ringcore.ring_attention(*tensors(), ring=world)
    if RANK == 1:
        raise KeyError("of the user's own")
    ringcore.ring_attention(*tensors(), ring=world)


def recovers():
    world = begin()
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=world, kernels=failing_on(1)))
    together()
    other = dist.new_group()
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=other))
    together()


def dies(who):
    world = begin()
    ringcore.ring_attention(*tensors(), ring=world)
    if who == RANK:
        os.kill(os.getpid(), signal.SIGKILL)
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=world))
    os._exit(3)  # torch.distributed may wait at its end for the process that held its store


def first_dies():
    dies(0)


def last_dies():
    dies(2)


def shapes_differ():
    world = begin()
    attempt(lambda: ringcore.ring_attention(*tensors(width=8 if RANK else 16), ring=world))
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=world))


def keywords_differ():
    world = begin()
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=world, causal=RANK == 1))
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=world))


def never_calls():
    ring = TorchTransport(begin(), timeout=3)
    if RANK != 1:
        attempt(lambda: ringcore.ring_attention(*tensors(), ring=ring))
    together()


def is_late():
    ring = TorchTransport(begin(), timeout=3)
    if RANK == 1:
        time.sleep(6)
    attempt(lambda: ringcore.ring_attention(*tensors(), ring=ring))
    together()


def does_not_enter():
    os.environ["RINGCORE_TIMEOUT"] = "1"
    world = begin()
    if RANK != 1:
        attempt(lambda: ringcore.ring_attention(*tensors(), ring=world))
    together()


def rings_for_ever():
    """Until somebody interrupts."""
    world = begin()
    given = tensors(length=2000)
    ringcore.ring_attention(*given, ring=world)
    say(f"rank {RANK}: pid {os.getpid()}")
    while True:
        ringcore.ring_attention(*given, ring=world)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    if dist.is_initialized():
        dist.destroy_process_group()
