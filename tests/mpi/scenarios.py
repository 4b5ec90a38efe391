"""What `test_launch.py` starts under mpiexec: ``python scenarios.py <name>``. Each prints one line for each rank."""

import os
import signal
import sys
import time

import numpy as np
import scenes
from mpi4py import MPI
from scenes import say

import ringcore
from ringcore_mpi import MpiTransport, adapt

COMM = MPI.COMM_WORLD
RANK = COMM.rank


def arrays(length=64, heads=2, width=8):
    return [np.random.default_rng(RANK).standard_normal((1, heads, length, width)) for _ in range(3)]


def attempt(call):
    scenes.attempt(RANK, call)


def failing_on(rank):
    from ringcore_numpy import NumpyKernels

    return scenes.Failing(NumpyKernels(), rank == RANK)


def fine():
    ringcore.ring_attention(*arrays(), ring=COMM)
    say(f"rank {RANK}: {adapt(COMM).explain}")


def alone():
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM))


def kernel_fails(**keywords):
    ring = MpiTransport(COMM, **keywords)
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=ring, kernels=failing_on(1)))
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=ring))


def kernel_fails_with_messages():
    kernel_fails(shared=False)


def kernel_fails_with_large_messages():
    ring = MpiTransport(COMM, shared=False, progress=True)
    attempt(lambda: ringcore.ring_attention(*arrays(length=512, width=128), ring=ring, kernels=failing_on(1)))
    attempt(lambda: ringcore.ring_attention(*arrays(length=512, width=128), ring=ring))


def nobody_catches():
    ringcore.ring_attention(*arrays(), ring=COMM, kernels=failing_on(1))


def recovers():
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM, kernels=failing_on(1)))
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM.Dup()))


def dies():
    ringcore.ring_attention(*arrays(), ring=COMM)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM))


def leaves_early():
    ringcore.ring_attention(*arrays(), ring=COMM)
    if RANK == 1:
        return
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=MpiTransport(COMM, timeout=1)))
    time.sleep(0.5)  # for mpiexec to pass on what was said
    COMM.Abort(7)  # the rank that left waits in MPI_Finalize for one that cannot be told


def shapes_differ():
    attempt(lambda: ringcore.ring_attention(*arrays(width=8 if RANK else 16), ring=COMM))
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM))


def keywords_differ():
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM, causal=RANK == 1))
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM))


def times_out():
    ring = MpiTransport(COMM, timeout=3)
    if RANK == 1:
        time.sleep(6)
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=ring))


def does_not_enter():
    os.environ["RINGCORE_TIMEOUT"] = "1"
    if RANK == 1:
        time.sleep(2)
    attempt(lambda: ringcore.ring_attention(*arrays(), ring=COMM))
    time.sleep(0.5)
    COMM.Abort(7)  # a duplication that not all ranks entered cannot be called off


def rings_for_ever():
    """Until somebody interrupts."""
    ring = adapt(COMM)
    q, k, v = arrays(length=2000)
    say(f"rank {RANK}: pid {os.getpid()}")
    while True:
        ringcore.ring_attention(q, k, v, ring=ring)


def thread_funneled():
    """MPI was started for one thread (see the end of this file's caller): no progress thread, still right."""
    ring = MpiTransport(COMM, shared=False, progress=True)
    ringcore.ring_attention(*arrays(), ring=ring)
    say(f"rank {RANK}: {MPI.Query_thread() < MPI.THREAD_MULTIPLE} {ring.explain}")


def finalizes_itself():
    ring = MpiTransport(COMM, shared=False, progress=True)
    ringcore.ring_attention(*arrays(), ring=ring)
    ringcore.ring_attention(*arrays(), ring=COMM)
    MPI.Finalize()
    say(f"rank {RANK}: fine")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
