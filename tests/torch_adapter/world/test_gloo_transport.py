"""The control plane: notes, places, one ring per group, and calls that go wrong."""

import gc
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ringcore
from ringcore import Move, OneSided, PeerError, RingTimeout, Spec, Transport, TransportError
from ringcore_torch import TorchTransport, adapt
from ringcore_torch.transport import _rings

BLOCK = torch.ones(1, 1, 100_000, 2)
SPEC = (Spec(tuple(BLOCK.shape), BLOCK, BLOCK.dtype),)


PATIENCE = 20  # seconds


@contextmanager
def before_the_deadline():
    """What is told is heard when it happens."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < PATIENCE / 2, "it was heard at the deadline only"


def entered(world, timeout=PATIENCE):
    """A ring that all ranks have entered: else the news of a failure may meet a rank that still makes its own."""
    ring = TorchTransport(world, timeout=PATIENCE)
    ring._circle.timeout = timeout  # for the calls; to make a ring may take longer
    dist.barrier()
    return ring


@pytest.fixture
def alone():
    """Skips what needs a peer."""
    if dist.get_world_size() == 1:
        pytest.skip("needs 2 ranks")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_notes_of_any_length_arrive_in_order(group, size):
    if ring := group(size):
        transport = adapt(ring)
        for length in (0, 1, 1000, 1016, 1017, 200_000):
            notes = transport.gather(bytes([transport.rank]) * (length * transport.rank))
            assert notes == tuple(bytes([rank]) * (length * rank) for rank in range(size))


def test_one_ring_for_each_group(world, group):
    transport = adapt(world)
    assert isinstance(transport, Transport)
    # It can read published blocks in place, but those in host memory go as messages.
    assert isinstance(transport, OneSided)
    assert not transport.publish((torch.ones(1, 1, 2, 4),), {})
    assert adapt(world) is adapt(init_device_mesh("cpu", (dist.get_world_size(),))) is transport
    other = group(dist.get_world_size())
    assert adapt(other) is not transport
    assert adapt(other).gather(b"x") == (b"x",) * dist.get_world_size()


def test_a_ring_goes_with_its_group(world):
    gc.collect()
    before = len(_rings)
    for _ in range(20):
        other = dist.new_group()
        ringcore.ring_attention(*[torch.ones(1, 1, 2, 2)] * 3, ring=other)
        dist.destroy_process_group(other)
    del other
    gc.collect()
    assert len(_rings) == before


def test_places(world):
    rank, size = dist.get_rank(), dist.get_world_size()
    transport = TorchTransport(world)
    assert (transport.node, transport.sharers) == (0, size)
    transport = TorchTransport(world, node=7 + rank // 2)
    assert (transport.node, transport.sharers) == (rank // 2 * 2, min(2, size - rank // 2 * 2))


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "soon"])
def test_deadlines_are_above_nothing(world, timeout):
    with pytest.raises(ringcore.KeywordError, match="timeout"):
        TorchTransport(world, timeout=timeout)


def test_what_is_no_ring(world):
    rank, size = dist.get_rank(), dist.get_world_size()
    outside = dist.new_group([size - 1])
    if rank != size - 1:
        with pytest.raises(TransportError, match=f"rank {rank} of the world is not in the process group"):
            ringcore.ring_attention(*[BLOCK] * 3, ring=outside)
    with pytest.raises(ringcore.KeywordError, match=r"2 dimensions, \('data', 'sequence'\).*give mesh\['data'\]"):
        adapt(init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "sequence")))
    with pytest.raises(ringcore.KeywordError, match=r"give mesh\.get_group\(0\)"):
        adapt(init_device_mesh("cpu", (1, 1, size)))
    with pytest.raises(ringcore.KeywordError, match=r"ring is a torch\.Tensor"):
        ringcore.ring_attention(*[BLOCK] * 3, ring=BLOCK)
    gone = dist.new_group()
    ringcore.ring_attention(*[BLOCK[:, :, :4]] * 3, ring=gone)
    dist.destroy_process_group(gone)
    with pytest.raises(TransportError, match="it was destroyed"):
        ringcore.ring_attention(*[BLOCK] * 3, ring=gone)


@pytest.mark.parametrize("absent", ["gather", "exchange"])
def test_a_peer_that_does_not_come_is_a_timeout_and_then_an_end(world, alone, absent):
    transport = entered(world, timeout=0.3)
    rank = transport.rank
    if rank == 0:
        assert transport._circle.heard(PATIENCE)  # and never makes the call
        with pytest.raises(PeerError, match="RingTimeout"):
            transport.gather(b"")
    else:
        call = {
            "gather": lambda: transport.gather(b""),
            "exchange": lambda: transport.exchange(
                "visiting", [(Move(0, rank), (BLOCK,))], [(Move(0, 0), SPEC)]
            ).wait(),
        }[absent]
        with pytest.raises((RingTimeout, PeerError), match=r"waited 0\.3 s for (rank 0|a visiting block from rank 0)"):
            call()
    for call in (lambda: transport.gather(b""), lambda: transport.exchange("carried", [], [])):
        with pytest.raises(TransportError, match="ended when an earlier call failed"):
            call()
    dist.barrier()


def test_an_abort_reaches_every_peer_with_its_reason(world, alone):
    transport = entered(world)
    last = transport.size - 1
    if transport.rank == last:
        time.sleep(0.05)
        transport.abort(ValueError("the disk is full"))
        with pytest.raises(TransportError, match="the disk is full"):
            transport.gather(b"")
    else:
        with before_the_deadline(), pytest.raises(PeerError, match=f"rank {last} failed.*ValueError: the disk is full"):
            transport.gather(b"")
        with pytest.raises(TransportError, match="the disk is full"):
            transport.gather(b"")
    dist.barrier()


def test_an_abort_ends_what_is_under_way(world, alone):
    transport = entered(world)
    if transport.rank == 0:
        pending = transport.exchange("visiting", [], [(Move(1, 1), SPEC)])  # held while its ring is closed
        transport.abort(ValueError("the disk is full"))
        with pytest.raises(TransportError, match="the disk is full"):
            pending.wait()
    else:
        with before_the_deadline(), pytest.raises(PeerError, match=r"rank 0 failed.*the disk is full"):
            transport.exchange("visiting", [], [(Move(0, 0), SPEC)]).wait()
    dist.barrier()


def test_an_interrupt_while_notes_are_exchanged_reaches_every_peer(world, alone, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    transport = entered(world)
    if transport.rank == 0:
        monkeypatch.setattr(transport._circle, "_first", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transport.gather(b"")
    else:
        # Whether its note had left or not: the one after it never comes.
        with before_the_deadline(), pytest.raises(PeerError, match=r"rank 0 failed.*KeyboardInterrupt"):
            [transport.gather(b"") for _ in range(2)]
    dist.barrier()


def test_a_new_ring_after_a_failure(world, alone):
    first = entered(world)
    first.abort(ValueError("of no concern"))
    assert TorchTransport(world).gather(b"x") == (b"x",) * first.size
    dist.barrier()


def test_one_call_at_a_time(world, alone):
    transport = entered(world)
    if transport.rank == 0:
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
    dist.barrier()


def test_another_thread_between_two_steps_of_a_call(world, alone):
    transport = entered(world)
    rank, size = transport.rank, transport.size
    left, right = (rank - 1) % size, (rank + 1) % size
    pending = transport.exchange("visiting", [(Move(right, rank), (BLOCK,))], [(Move(left, left), SPEC)])
    dist.barrier()
    failures = []

    def call():
        try:
            transport.gather(b"")
        except TransportError as error:
            failures.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert failures
    assert "One call at a time" in failures[0]
    with pytest.raises((TransportError, PeerError), match="One call at a time"):
        transport.gather(b"")
    del pending
    dist.barrier()


def test_a_ring_lives_until_its_gradients_were_made_and_no_longer(world):
    ring = TorchTransport(world)
    gone = weakref.ref(ring)
    x = torch.ones(1, 1, 4, 2, requires_grad=True)
    out = ringcore.ring_attention(x, x, x, ring=ring)
    del ring
    gc.collect()
    assert gone() is not None
    out.sum().backward()
    assert x.grad is not None
    del out
    gc.collect()
    assert gone() is None
    dist.barrier()
