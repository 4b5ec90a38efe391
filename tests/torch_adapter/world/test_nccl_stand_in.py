"""The ring over NCCL where there is neither NCCL nor a GPU: gloo stands in for the one, nothing for the streams.

What streams order is tested elsewhere: by strict channels (tests/plan), and on GPUs.
"""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
from across import dense, draw
from torch.distributed import distributed_c10d

import ringcore
from ringcore import PeerError, TransportError
from ringcore_torch import TorchTransport
from ringcore_torch.nccl import NcclMessages

UNWATCHED = "TORCH_NCCL_BLOCKING_WAIT"
CPU = torch.device("cpu")


class Stream:
    """All is over as soon as it was given."""

    def __init__(self, *_, **__):
        pass

    def wait_event(self, mark):
        assert mark == "mark"

    def record_event(self):
        return "mark"


class Work:
    def __init__(self, parts):
        self.parts = parts

    def synchronize(self):
        for part in self.parts:
            part.wait()


class StandIn:
    """What `ProcessGroupNCCL` is used for. made: all there are, with what was seen of the environment."""

    made = []  # noqa: RUF012

    class Options:
        def __init__(self, is_high_priority_stream):
            assert is_high_priority_stream

    def __init__(self, store, rank, size, options):
        self.unwatched = os.environ.get(UNWATCHED)
        self.gloo = distributed_c10d.ProcessGroupGloo(store, rank, size, options._timeout)
        self.open = self.aborted = self.connected = False
        self.groups = []
        self.made.append(self)

    def eager_connect_single_device(self, device):
        self.connected = True

    def _start_coalescing(self):
        assert self.connected
        assert not self.open
        self.open = True
        self.groups.append([])

    def _started(self, name, x, peer, work):
        assert self.open
        if self.aborted:
            raise RuntimeError("the communicator was aborted")
        assert x.ndim == 1
        self.groups[-1].append((name, peer, x.numel()))
        return work([x], peer, 0)

    def send(self, tensors, peer, tag):
        self.parts = [*getattr(self, "parts", []), self._started("send", *tensors, peer, self.gloo.send)]

    def recv(self, tensors, peer, tag):
        assert tensors[0].isnan().all(), "what does not arrive must show"
        self.parts = [*getattr(self, "parts", []), self._started("receive", *tensors, peer, self.gloo.recv)]

    def _end_coalescing(self):
        self.open, parts, self.parts = False, getattr(self, "parts", []), []
        return Work(parts)

    def abort(self):
        self.aborted = True

    def shutdown(self):
        pass


@pytest.fixture
def ring(world, monkeypatch):
    """A ring that takes tensors in host memory for tensors on a GPU; refuses to be one rank."""
    if dist.get_world_size() == 1:
        pytest.skip("needs 2 ranks")
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **how: zeros(*shape, **how))
    monkeypatch.setattr(distributed_c10d, "ProcessGroupNCCL", StandIn, raising=False)
    monkeypatch.setattr(StandIn, "made", [])
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "is_current_stream_capturing": lambda: False,
        "set_device": lambda device: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delenv(UNWATCHED, raising=False)
    ring = TorchTransport(world, timeout=10)
    ring._carrier = carrier = NcclMessages(ring._circle, CPU)
    monkeypatch.setattr(ring, "publish", lambda *blocks: carrier.publish(*blocks) or True)
    monkeypatch.setattr(ring, "exchange", carrier.exchange)
    dist.barrier()  # else the news of a failure may meet a rank that still makes its own
    yield ring
    carrier.abort()
    dist.barrier()


def test_groups_are_made_without_a_watchdog_that_ends_the_process(ring):
    visiting, carried = StandIn.made
    assert visiting.unwatched == carried.unwatched == "1"
    assert UNWATCHED not in os.environ


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_gradients_are_those_of_dense_attention(ring, layout):
    whole = draw(rows=23)
    dout = torch.randn(1, 2, 23, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    due_out, _ = dense(*whole)
    due = [due_out.detach(), *torch.autograd.grad(due_out, whole, dout)]
    *parts, dout = (ringcore.shard(x.detach(), layout, ring.rank, ring.size) for x in (*whole, dout))
    (out, _), pullback = ringcore.ring_attention_vjp(*parts, ring=ring, layout=layout, causal=True)
    for came, x in zip((out, *pullback(dout)), due, strict=True):
        torch.testing.assert_close(came, ringcore.shard(x, layout, ring.rank, ring.size))


def test_a_step_is_one_group_and_all_have_met_before(ring):
    block = torch.ones(1, 1, 4 * ring.size, 2)
    parts = [ringcore.shard(block, "contiguous", ring.rank, ring.size)] * 3
    ringcore.ring_attention(*parts, ring=ring)
    after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
    visiting, carried = (one.groups for one in StandIn.made)
    peers = [(ring.rank + hop) % ring.size for hop in range(1, ring.size)]
    assert carried == [[*(("send", peer, 1) for peer in peers), *(("receive", peer, 1) for peer in peers)]]
    step = [("send", after, 8)] * 2 + [("receive", before, 8)] * 2
    assert visiting == [*carried, *[step] * (ring.size - 1)]
    assert ring.messages_sent == 2 * (ring.size - 1)


def test_what_nccl_refuses_is_our_error_and_leaves_no_group_open(ring):
    StandIn.made[0].aborted = True
    parts = [torch.ones(1, 1, 4, 2)] * 3
    with pytest.raises((TransportError, PeerError), match="the communicator was aborted"):
        ringcore.ring_attention(*parts, ring=ring)
    assert not StandIn.made[0].open
    assert all(one.aborted for one in StandIn.made)


def test_an_abort_reaches_the_peers(ring):
    if ring.rank == 0:
        ring.abort(ValueError("the disk is full"))
        assert all(one.aborted for one in StandIn.made)
    else:
        with pytest.raises(PeerError, match=r"rank 0 failed.*ValueError: the disk is full"):
            ring.gather(b"")
    dist.barrier()


def test_a_capture_before_the_first_call_is_refused_by_name(ring, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(TransportError, match=r"captured before it ever ran.*Run the call once"):
        NcclMessages(ring._circle, CPU)
