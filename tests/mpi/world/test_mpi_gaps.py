"""Torch tensors whose elements do not lie in order: other axes, and every second element of a wider one."""

import pytest
from mpi4py import MPI
from shards import problem, same

import ringcore
from ringcore_mpi import MpiTransport


@pytest.mark.parametrize("shared", [True, False])
def test_tensors_with_gaps_between_elements(group, shared):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm, shared=shared)
    task = problem(comm.size, convert=torch.from_numpy)
    due = task.shard(task.expected()[0], comm.rank)
    turned = (x.transpose(1, 2) for x in task.shards(comm.rank))
    same("out", due, ringcore.ring_attention(*turned, ring=transport, axes="bshd").transpose(1, 2))
    gapped = (x.repeat_interleave(2, dim=3)[..., ::2] for x in task.shards(comm.rank))
    same("out", due, ringcore.ring_attention(*gapped, ring=transport))
    transport.close()
