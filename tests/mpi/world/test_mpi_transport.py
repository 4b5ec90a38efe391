"""The control plane: notes, places, one ring per communicator, and calls that go wrong."""

import threading
import time

import numpy as np
import pytest
from mpi4py import MPI

import ringcore
from ringcore import Move, OneSided, PeerError, RingTimeout, Spec, TransportError
from ringcore_mpi import MpiTransport, adapt

PATIENCE = 20  # seconds


@pytest.fixture
def comm(group):
    return group(MPI.COMM_WORLD.size)


def entered(comm, timeout=PATIENCE, **how):
    """A ring that all ranks have entered: else the news of a failure may meet a rank that still makes its own."""
    ring = MpiTransport(comm, timeout=PATIENCE, **how)
    ring._line.timeout = timeout  # for the calls; to make a ring may take longer
    comm.Barrier()
    return ring


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_notes_of_any_length_arrive_in_order(group, size):
    if comm := group(size):
        transport = adapt(comm)
        for length in (0, 1, 1000, 200_000):
            notes = transport.gather(bytes([comm.rank]) * (length * comm.rank))
            assert notes == tuple(bytes([rank]) * (length * rank) for rank in range(size))


def test_one_ring_for_each_communicator(comm):
    transport = adapt(comm)
    assert isinstance(transport, OneSided)
    assert adapt(comm) is transport
    other = comm.Dup()
    assert adapt(other) is not transport
    assert adapt(other).gather(b"x") == (b"x",) * comm.size
    ring = adapt(other)
    other.Free()
    with pytest.raises(TransportError, match="closed"):
        ring.gather(b"")
    assert transport.gather(b"y") == (b"y",) * comm.size


def test_many_communicators_are_freed(comm):
    for _ in range(50):  # an MPI library has only some thousand to give: none may be left over
        other = comm.Dup()
        ringcore.ring_attention(*[np.ones((1, 1, 2, 2))] * 3, ring=other)
        other.Free()


def test_places(comm):
    transport = MpiTransport(comm)
    assert (transport.node, transport.sharers) == (0, comm.size)
    transport.close()
    transport = MpiTransport(comm, node=7 + comm.rank // 2)
    assert (transport.node, transport.sharers) == (7 + comm.rank // 2, comm.size)
    for owner in range(comm.size):
        assert transport.reaches(0, owner) == (owner == 1)
    transport.close()


def test_node_on_some_ranks_only(comm):
    if comm.size > 1:
        with pytest.raises((ringcore.AgreementError, PeerError), match="not on rank 1"):
            MpiTransport(comm, node=None if comm.rank == 1 else 0)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_deadlines_are_above_nothing(comm, timeout):
    with pytest.raises(ringcore.KeywordError, match="timeout"):
        MpiTransport(comm, timeout=timeout)


@pytest.mark.parametrize("word", ["no", 0, 1.0])
def test_whether_mpi_takes_device_memory_is_said_plainly(comm, word):
    with pytest.raises(ringcore.KeywordError, match="device_buffers is"):
        MpiTransport(comm, device_buffers=word)


def test_communicators_that_are_no_ring(comm):
    with pytest.raises(TransportError, match="COMM_NULL"):
        adapt(MPI.COMM_NULL)
    if comm.size > 1:
        side = comm.rank % 2
        half = comm.Split(side, comm.rank)
        between = half.Create_intercomm(0, comm, 1 - side)
        with pytest.raises(TransportError, match="intercommunicator"):
            adapt(between)
        between.Free()
        half.Free()


@pytest.mark.parametrize("absent", ["gather", "exchange", "publish"])
def test_a_peer_that_does_not_come_is_a_timeout_and_then_an_end(comm, absent):
    transport = entered(comm, timeout=0.3)
    if comm.size == 1:
        return
    x = np.ones((1, 1, 100_000, 2))
    if comm.rank == 0:
        time.sleep(3)  # and never makes the call
        with pytest.raises(PeerError, match="RingTimeout"):
            transport.gather(b"")
    else:
        spec = (Spec(x.shape, x, x.dtype),)
        call = {
            "gather": lambda: transport.gather(b""),
            "publish": lambda: transport.publish((x,), dict.fromkeys(range(comm.size), spec)),
            "exchange": lambda: transport.exchange(
                "visiting", [(Move(0, comm.rank), (x,))], [(Move(0, 0), spec)]
            ).wait(),
        }[absent]
        with pytest.raises((RingTimeout, PeerError), match=r"waited 0\.3 s for"):
            call()
    for call in (lambda: transport.gather(b""), lambda: transport.exchange("carried", [], []), transport.retire):
        with pytest.raises(TransportError, match="ended when an earlier call failed"):
            call()
    comm.Barrier()


def test_an_abort_reaches_every_peer_with_its_reason(comm):
    transport = entered(comm)
    if comm.size == 1:
        return
    last = comm.size - 1
    if comm.rank == last:
        time.sleep(0.05)
        transport.abort(ValueError("the disk is full"))
        with pytest.raises(TransportError, match="the disk is full"):
            transport.gather(b"")
    else:
        with pytest.raises(PeerError, match=f"rank {last} failed.*ValueError: the disk is full"):
            transport.gather(b"")
        with pytest.raises(TransportError, match="the disk is full"):
            transport.gather(b"")
    transport.close()
    comm.Barrier()


def test_ranks_that_are_out_of_step_hear_of_it(comm):
    transport = MpiTransport(comm, node=0)
    x = np.ones((1, 1, 2, 2))
    specs = dict.fromkeys(range(comm.size), (Spec(x.shape, x, x.dtype),))
    if comm.size == 1:
        return
    with pytest.raises((ringcore.AgreementError, PeerError), match=r"out of step.*operation"):
        transport.gather(b"") if comm.rank == 0 else transport.allocate(specs)
    comm.Barrier()


def test_one_call_at_a_time(comm):
    transport = entered(comm)
    if comm.size == 1:
        return
    if comm.rank == 0:
        failures = []

        def call():
            try:
                transport.gather(b"")
            except (TransportError, PeerError) as error:
                failures.append(error)

        first = threading.Thread(target=call)
        first.start()
        time.sleep(0.2)
        with pytest.raises(TransportError, match="One call at a time per ring"):
            transport.gather(b"")
        first.join()
        assert "One call at a time" in str(failures[0])
    else:
        time.sleep(0.6)
        with pytest.raises(PeerError, match="One call at a time per ring"):
            transport.gather(b"")
    comm.Barrier()


def test_another_thread_between_two_steps_of_a_call(comm):
    transport = entered(comm, shared=False)
    if comm.size == 1:
        return
    x = np.ones((1, 1, 100_000, 2))
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    receives = [(Move(left, left), [Spec(x.shape, x, x.dtype)])]
    pending = transport.exchange("visiting", [(Move(right, comm.rank), (x,))], receives)
    comm.Barrier()  # the news of a failure must not meet a rank that has not begun
    failures = []

    def call():
        try:
            transport.gather(b"")
        except TransportError as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "One call at a time" in failures[0]
    with pytest.raises((TransportError, PeerError), match="One call at a time"):
        pending.wait()
    comm.Barrier()
