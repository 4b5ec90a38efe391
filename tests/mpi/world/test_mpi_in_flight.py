"""Blocks that a late peer has still to take: nothing is reused before it did, and nobody waits in vain.

Large messages leave only once their receiver takes part, and a window is read where it lies.
"""

import threading
import time

import numpy as np
import pytest
from mpi4py import MPI
from shards import problem

import ringcore
from ringcore import Move, PeerError, Spec, TransportError
from ringcore_mpi import MpiTransport
from ringcore_numpy import NumpyKernels


@pytest.mark.parametrize("progress", [False, True])
def test_a_block_may_be_overwritten_once_it_was_waited_for(group, progress):
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm, shared=False, progress=progress)
    block = np.full((1, 1, 500_000, 2), 7.0)
    if comm.rank == 0:
        sends = [(Move(peer, 0), (block,)) for peer in range(1, comm.size)]
        transport.exchange("visiting", sends, []).wait()
        block[...] = -1
    else:
        time.sleep(0.2 * comm.rank)  # late
        came = transport.exchange("visiting", [], [(Move(0, 0), [Spec(block.shape, block, block.dtype)])]).wait()
        assert (came[Move(0, 0)][0] == 7).all()
    transport.close()


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_large_blocks_pass_around_rings_of_any_size(group, size, progress):
    if comm := group(size):
        transport = MpiTransport(comm, shared=False, progress=progress)
        problem(size, length=500 * size, heads=(1, 1), width=128).check(transport, comm.rank)
        transport.close()


class Slow(NumpyKernels):
    """Kernels that look at their keys late."""

    def forward(self, *arrays, **keywords):
        time.sleep(0.2)
        return super().forward(*arrays, **keywords)


def test_allocated_inputs_may_be_overwritten_after_the_call(group):
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm)
    task = problem(comm.size)
    q, k, v = task.shards(comm.rank)
    shapes = [task.shard(task.k, rank).shape for rank in range(comm.size)]
    mine = transport.allocate({rank: (Spec(shape, k, k.dtype),) * 2 for rank, shape in enumerate(shapes)})
    if mine is not None:
        mine[0][...], mine[1][...] = k, v
        out = ringcore.ring_attention(q, *mine, ring=transport, kernels=Slow() if comm.rank == 0 else NumpyKernels())
        for x in mine:
            x[...] = np.nan
        np.testing.assert_array_equal(out, task.shard(task.expected()[0], comm.rank))
    transport.close()


def test_another_thread_while_blocks_are_published(group):
    comm = group(MPI.COMM_WORLD.size)
    if comm.size == 1:
        return
    transport = MpiTransport(comm, timeout=10)
    x = np.ones((1, 1, 5, 2))
    transport.publish((x,), dict.fromkeys(range(comm.size), (Spec(x.shape, x, x.dtype),)))
    comm.Barrier()  # the news of a failure must not meet a rank that has not begun
    failures = []

    def call():
        try:
            transport.gather(b"")
        except (TransportError, PeerError) as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert failures
    assert "One call at a time" in failures[0]
    with pytest.raises((TransportError, PeerError), match="One call at a time"):
        transport.retire()
    comm.Barrier()
