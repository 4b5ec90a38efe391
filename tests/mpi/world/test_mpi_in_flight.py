"""Large messages, which leave only once their receiver takes part: nothing is reused before, and nobody waits in vain."""

import time

import numpy as np
import pytest
from mpi4py import MPI
from shards import problem

from ringcore import Move, Spec
from ringcore_mpi import MpiTransport


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
