"""Shared windows: publish, fetch, allocate, and too little room."""

import numpy as np
import pytest
from mpi4py import MPI
from shards import problem

import ringcore
import ringcore_mpi.window
from ringcore import Spec
from ringcore_mpi import MpiTransport


@pytest.fixture
def transport(group):
    comm = group(MPI.COMM_WORLD.size)
    if comm.size == 1:
        pytest.skip("one rank shares with nobody")
    transport = MpiTransport(comm)
    yield transport
    transport.close()


def specs(size, height=5, like=None):
    like = np.empty(0) if like is None else like
    return {rank: (Spec((1, 1, height + rank, 2), like, like.dtype),) for rank in range(size)}


def block(rank, height=5, factor=1.0):
    return np.full((1, 1, height + rank, 2), float(factor * (rank + 1)))


def test_published_blocks_are_read_in_place(transport):
    rank = transport.rank
    assert transport.publish((block(rank),), specs(transport.size))
    for owner in range(transport.size):
        assert transport.reaches(rank, owner) == (owner != rank)
        if owner != rank:
            (x,) = transport.fetch(owner, None)
            np.testing.assert_array_equal(x, block(owner))
            assert not x.flags.writeable
            assert transport.fetch(owner, slice(1, 3))[0].shape == (1, 1, 2, 2)
            del x
    transport.retire()
    assert "window" in transport.explain


def test_what_was_read_does_not_change_before_it_is_retired(transport):
    for turn in range(300):
        transport.publish((block(transport.rank, factor=turn),), specs(transport.size))
        for owner in set(range(transport.size)) - {transport.rank}:
            assert (transport.fetch(owner, None)[0] == turn * (owner + 1)).all()
        transport.retire()
    assert transport.windows == 1


def test_windows_grow_and_the_outgrown_are_freed(transport):
    for height in (10, 1000, 20, 5000, 100_000):
        assert transport.publish((block(transport.rank, height),), specs(transport.size, height))
        owner = (transport.rank + 1) % transport.size
        np.testing.assert_array_equal(transport.fetch(owner, None)[0], block(owner, height))
        transport.retire()
        assert transport.windows == 1


def test_an_outgrown_window_lives_on_while_an_array_lies_in_it(transport):
    transport.publish((block(transport.rank),), specs(transport.size))
    kept = transport.fetch((transport.rank + 1) % transport.size, None)[0] if transport.rank == 0 else None
    transport.retire()
    transport.publish((block(transport.rank, 5000),), specs(transport.size, 5000))
    transport.retire()
    assert transport.windows == 2
    if kept is not None:
        np.testing.assert_array_equal(kept, block(1))
    del kept
    transport.publish((block(transport.rank, 9000),), specs(transport.size, 9000))
    transport.retire()
    assert transport.windows == 1


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_allocated_arrays_are_published_without_a_copy(transport, library):
    xp = pytest.importorskip(library)
    like = xp.zeros(1, dtype=xp.float32)
    rank, sizes = transport.rank, specs(transport.size, 700, like)
    (mine,) = transport.allocate(sizes)
    mine[...] = rank + 1
    assert transport.publish((mine,), sizes)
    assert transport.windows == 1  # no other one was made to copy into
    owner = (rank + 1) % transport.size
    assert (transport.fetch(owner, None)[0] == owner + 1).all()
    transport.retire()
    # Other arrays of the same shapes go elsewhere: what was allocated is its owner's.
    other = xp.zeros_like(mine)
    assert transport.publish((other,), sizes)
    assert (transport.fetch(owner, None)[0] == 0).all()
    transport.retire()
    assert (mine == rank + 1).all()
    assert transport.windows == 2
    # One rank alone that publishes something else is enough.
    assert transport.publish((other if rank == 0 else mine,), sizes)
    assert (transport.fetch(owner, None)[0] == (0 if owner == 0 else owner + 1)).all()
    transport.retire()
    del mine
    transport.publish((block(rank, 90_000),), specs(transport.size, 90_000))
    transport.retire()
    assert transport.windows == 1


def test_a_ring_reads_allocated_inputs_in_place(transport):
    task = problem(transport.size, causal=True)
    q, k, v = task.shards(transport.rank)
    lengths = [task.shard(task.k, rank).shape for rank in range(transport.size)]
    sizes = {rank: (Spec(shape, k, k.dtype), Spec(shape, v, v.dtype)) for rank, shape in enumerate(lengths)}
    mine = transport.allocate(sizes)
    mine[0][...], mine[1][...] = k, v
    out = ringcore.ring_attention(q, *mine, ring=transport, causal=True)
    np.testing.assert_array_equal(out, task.shard(task.expected()[0], transport.rank))
    assert transport.windows == 1


def test_arrays_outlive_the_transport(group):
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm)
    made = transport.allocate(specs(comm.size))
    assert (made is None) == (comm.size == 1)
    if made:
        made[0][...] = 3
    transport.close()
    if made:
        assert (made[0] == 3).all()


@pytest.mark.parametrize("where", ["every rank", "rank 1", "second host"])
def test_too_little_room_falls_back_to_messages_everywhere_alike(group, monkeypatch, where):
    comm = group(MPI.COMM_WORLD.size)
    poor = {"every rank": True, "rank 1": comm.rank == 1, "second host": comm.rank >= 2}[where]
    if poor:
        monkeypatch.setattr(ringcore_mpi.window, "free_room", lambda: 100)
    transport = MpiTransport(comm, node=comm.rank // 2 if where == "second host" else 0)
    problem(comm.size, "zigzag", causal=True).check(transport, comm.rank)
    first_host = where == "second host" and comm.rank < 2
    if comm.size == 4:
        assert transport.windows == first_host
        assert ("no room in shared memory" in transport.explain) != first_host
        assert (transport.allocate(specs(comm.size)) is None) != first_host
    transport.close()


def test_memory_that_cannot_be_had_falls_back_to_messages(group, monkeypatch):
    comm = group(MPI.COMM_WORLD.size)
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(ringcore_mpi.window.Window, "populate", lambda self: False)
    transport = MpiTransport(comm)
    problem(comm.size, causal=True).check(transport, comm.rank)
    assert transport.windows == 0
    transport.close()
