"""Dtypes, array libraries, pieces, and the memory around blocks."""

from dataclasses import dataclass

import numpy as np
import pytest
from mpi4py import MPI
from shards import problem

import ringcore
import ringcore_mpi.messages
from ringcore import Move, Spec
from ringcore_mpi import MpiTransport


@pytest.fixture(params=[True, False], ids=["window", "messages"])
def transport(group, request):
    transport = MpiTransport(group(MPI.COMM_WORLD.size), shared=request.param)
    yield transport
    transport.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numpy_of_every_dtype(transport, dtype):
    problem(transport.size, "zigzag", dtype=dtype, causal=True).check(transport, transport.rank)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_of_every_dtype(transport, dtype):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    task = problem(
        transport.size, "zigzag", convert=lambda x: torch.from_numpy(x).to(getattr(torch, dtype)), causal=True
    )
    task.check(transport, transport.rank)


@pytest.mark.parametrize("name", ["array_api_strict", "jax.numpy"])
def test_other_libraries_are_refused_by_name_before_anything_is_sent(transport, name):
    xp = pytest.importorskip(name)
    x = xp.ones((1, 1, 4, 2))
    if transport.size == 1:
        return
    with pytest.raises((ringcore.UnsupportedError, ringcore.PeerError), match=name.partition(".")[0]):
        ringcore.ring_attention(x, x, x, ring=transport)
    assert transport.messages_sent == 0


@pytest.mark.parametrize("piece", [1000, 999, 7])
def test_blocks_in_pieces(group, monkeypatch, piece):
    monkeypatch.setattr(ringcore_mpi.messages, "PIECE", piece)
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm, shared=False)
    problem(comm.size, "zigzag", causal=True, dtype="float32").check(transport, comm.rank)
    if comm.size > 1:
        assert transport.messages_sent > transport.bytes_sent / piece
    transport.close()


@dataclass(frozen=True)
class Guarded(Spec):
    """Makes blocks with guard bytes before and after."""

    def empty(self):
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        memory = np.full(size + 128, 0xA5, dtype=np.uint8)
        return memory[64 : 64 + size].view(self.dtype).reshape(self.shape)


@pytest.mark.parametrize("length", [0, 1, 33, 20_000])
def test_received_blocks_keep_to_their_memory(group, length):
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm, shared=False)
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    if comm.size > 1:
        mine = tuple(np.full((1, 1, length, 3), value, dtype=np.float32) for value in (comm.rank, -comm.rank))
        due = Move(left, left)
        specs = [Guarded(x.shape, x, x.dtype) for x in mine]
        got = transport.exchange("visiting", [(Move(right, comm.rank), mine)], [(due, specs)]).wait()[due]
        for x, value in zip(got, (left, -left), strict=True):
            assert x.shape == (1, 1, length, 3)
            assert (x == value).all()
            memory = x.base
            while memory.base is not None:
                memory = memory.base
            assert (memory[:64] == 0xA5).all()
            assert (memory[-64:] == 0xA5).all()
    transport.close()


@pytest.mark.parametrize("progress", [False, True])
def test_what_is_sent_is_what_lay_there_however_late_the_peer(group, progress):
    """Nothing is held back: many exchanges under way at once, and waited for in the other order."""
    comm = group(MPI.COMM_WORLD.size)
    transport = MpiTransport(comm, shared=False, progress=progress)
    if comm.size > 1:
        left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
        blocks = [np.full((1, 1, 50_000, 2), 100 * comm.rank + turn) for turn in range(5)]
        originals = [x.copy() for x in blocks]
        due = Move(left, left)
        under_way = [
            transport.exchange("visiting", [(Move(right, comm.rank), (x,))], [(due, [Spec(x.shape, x, x.dtype)])])
            for x in blocks
        ]
        for turn, pending in reversed(list(enumerate(under_way))):
            assert (pending.wait()[due][0] == 100 * left + turn).all()
        for x, original in zip(blocks, originals, strict=True):
            np.testing.assert_array_equal(x, original)
    transport.close()


def test_inputs_are_not_written_to(transport):
    task = problem(transport.size, causal=True)
    shards = task.shards(transport.rank)
    before = [x.copy() for x in shards]
    for x in shards:
        x.flags.writeable = False
    ringcore.ring_attention(*shards, ring=transport, causal=True)
    for x, original in zip(shards, before, strict=True):
        np.testing.assert_array_equal(x, original)
