"""Whole calls over MPI against the ring in one process."""

import numpy as np
import pytest
from mpi4py import MPI
from shards import problem, same

import ringcore
from ringcore_mpi import MpiTransport, adapt


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ring_of_any_size_is_bit_for_bit_the_ring_in_one_process(group, size, layout):
    if comm := group(size):
        problem(size, layout, causal=True).check(comm, comm.rank)


@pytest.mark.parametrize("keywords", [{}, {"window": (9, 4)}, {"softcap": 5.0}, {"key_lengths": (53, 17)}])
def test_keywords_reach_every_rank(group, keywords):
    comm = group(MPI.COMM_WORLD.size)
    problem(comm.size, "zigzag", **keywords).check(comm, comm.rank)


def test_ranks_of_the_ring_are_those_of_its_communicator(group):
    comm = group(MPI.COMM_WORLD.size, order=-1)
    assert comm.rank == comm.size - 1 - MPI.COMM_WORLD.rank
    assert adapt(comm).rank == comm.rank
    problem(comm.size, causal=True).check(comm, comm.rank)


@pytest.mark.parametrize("part", ["even and odd", "two rings at once"])
def test_ring_of_a_part_of_the_world(part):
    world = MPI.COMM_WORLD
    comm = world.Split(world.rank % 2 if part == "even and odd" else world.rank // 2, world.rank)
    problem(comm.size, "zigzag", causal=True).check(comm, comm.rank)
    comm.Free()


def transports(comm):
    """All the ways in which blocks can travel."""
    return {
        "window": MpiTransport(comm),
        "messages": MpiTransport(comm, shared=False),
        "two hosts": MpiTransport(comm, node=10 * (comm.rank // 2)),
        "two hosts, interleaved": MpiTransport(comm, node=comm.rank % 2),
        "thread": MpiTransport(comm, shared=False, progress=True),
    }


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_window_messages_and_both_give_the_same_bits(group, layout):
    comm = group(MPI.COMM_WORLD.size)
    task = problem(comm.size, layout, causal=True)
    for name, transport in transports(comm).items():
        task.check(transport, comm.rank)
        if comm.size == 4:
            moved = {"window": False, "two hosts": True, "two hosts, interleaved": True}.get(name, True)
            total = sum(comm.allgather(transport.bytes_published))
            assert (total > 0) == (name not in ("messages", "thread"))
            assert moved or transport.bytes_sent <= sum(x.nbytes for x in task.expected()[3:])  # dk, dv alone
        transport.close()


def test_blocks_are_not_sent_to_ranks_that_read_them_in_place(group):
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm)
    task = problem(comm.size)
    ringcore.ring_attention(*task.shards(comm.rank), ring=transport)
    assert transport.messages_sent == transport.bytes_sent == 0
    transport.close()


@pytest.mark.parametrize("lengths", [(20, 0, 1, 9), (0, 0, 0, 7), (1, 1, 1, 1), (0, 5, 0, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_uneven_and_empty_shards(group, lengths, shared):
    comm = group(MPI.COMM_WORLD.size)
    lengths = (lengths * 2)[-comm.size :]
    transport = MpiTransport(comm, shared=shared)
    task = problem(comm.size, ringcore.from_lengths(lengths), length=sum(lengths), causal=True)
    task.check(transport, comm.rank)
    transport.close()


def test_grouped_heads_and_other_axes_with_gaps_between_elements(group):
    comm = group(MPI.COMM_WORLD.size)
    task = problem(comm.size, causal=True)
    due = task.shard(task.expected()[0], comm.rank)
    for transport in (MpiTransport(comm), MpiTransport(comm, shared=False)):
        turned = (np.swapaxes(x, 1, 2) for x in task.shards(comm.rank))
        came = ringcore.ring_attention(*turned, ring=transport, causal=True, axes="bshd")
        same("out", due, np.swapaxes(came, 1, 2))
        gapped = (np.repeat(x, 2, axis=3)[..., ::2] for x in task.shards(comm.rank))
        same("out", due, ringcore.ring_attention(*gapped, ring=transport, causal=True))
        transport.close()


def test_two_hundred_calls_keep_one_window(group):
    import resource

    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm)
    task = problem(comm.size, length=400, heads=(1, 1), width=32)
    shards = task.shards(comm.rank)
    memory = []
    for _ in range(200):
        ringcore.ring_attention(*shards, ring=transport)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert transport.windows == (comm.size > 1)
    assert memory[-1] - memory[50] < 4096  # KiB
    transport.close()


@pytest.mark.parametrize(("window", "reached"), [((5, 0), (5, 0)), ((3, 2), (3, 2)), ((0, 0), (0, 0))])
def test_a_window_sends_the_rows_that_it_reaches_beyond_each_ranks_own(window, reached):
    comm = MPI.COMM_WORLD
    transport = MpiTransport(comm, shared=False)
    task = problem(comm.size, length=20 * comm.size, window=window)
    task.check(transport, comm.rank)
    # A neighbour reads this many of this rank's last and first rows; their gradients come back.
    rows = reached[0] * (comm.rank < comm.size - 1) + reached[1] * (comm.rank > 0)
    given = reached[0] * (comm.rank > 0) + reached[1] * (comm.rank < comm.size - 1)
    row = 2 * 2 * 2 * 8 * task.k.itemsize  # of k and v: 2 batch entries, 2 heads, 8 columns
    assert transport.bytes_sent == (2 * rows + given) * row
    transport.close()


def test_documents_that_end_where_shards_do_send_nothing():
    comm = MPI.COMM_WORLD
    transport = MpiTransport(comm, shared=False)
    ends = [0, *(20 * (rank + 1) for rank in range(comm.size))]
    problem(comm.size, length=ends[-1], cu_seqlens=ends).check(transport, comm.rank)
    assert transport.bytes_sent == 0
    transport.close()
