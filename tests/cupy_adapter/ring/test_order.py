"""Streams wait for what they need: rings in threads, under the detector of races, and with each wait left out."""

import contextlib
import threading
import time

import cupy
import numpy as np
import pytest
from happens_before import TRACE, traced
from thread_host import ThreadHost, in_threads

import ringcore
from ringcore.tile import ReferenceKernels
from ringcore_cupy import CupyTransport, peer_memory, region, staging, streams
from ringcore_cupy.nccl_messages import Exchange, NcclMessages

CARRIERS = ("ipc", "nccl", "mpi", "host")


class Watched(ReferenceKernels):
    """The reference kernels, whose accesses are noted."""

    def forward(self, q, k, v, **keywords):
        for x in (k, v):
            TRACE.array(x, "read", "a tile")
        return super().forward(q, k, v, **keywords)

    def backward(self, dout, q, k, v, maximum, total, delta, *, into, **keywords):
        for x in (k, v):
            TRACE.array(x, "read", "a tile's gradients")
        for x in (into.dk, into.dv):
            TRACE.array(x, "write", "a tile's gradients")
        return super().backward(dout, q, k, v, maximum, total, delta, into=into, **keywords)


def call(ring, seed, layout):
    """One whose inputs are overwritten as soon as it returned.

    The layout "alone" is one where no rank sees anything of another.
    """
    window, layout = ((0, 0), "contiguous") if layout == "alone" else (None, layout)
    whole = [np.random.default_rng((seed, part)).standard_normal((1, 1, 6 * ring.size, 4)) for part in range(4)]
    q, k, v, dout = (cupy.asarray(ringcore.shard(x, layout, ring.rank, ring.size)) for x in whole)
    (out, _), pullback = ringcore.ring_attention_vjp(
        q, k, v, wrt=("q", "k", "v"), ring=ring, layout=layout, causal=True, window=window, kernels=Watched()
    )
    found = [out, *pullback(dout, None)]
    for x in (k, v):
        x[...] = 0
    for x in found:
        TRACE.array(x, "read", "the caller")


def calls(world, rank, carrier, nodes, number, layout):
    """Some calls in a row."""
    ring = CupyTransport(ThreadHost(world, rank, nodes, device_buffers=True), carrier=carrier)
    for seed in range(number):
        call(ring, seed, layout)
    ring.close()


def races(monkeypatch, size, carrier, nodes=None, number=3, layout="zigzag", left_out=None):
    with traced(monkeypatch) as trace:
        if left_out is not None:
            monkeypatch.setattr(*left_out)
        in_threads(size, calls, carrier, nodes, number, layout)
        return trace.races


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_no_access_meets_another_one(monkeypatch, carrier, size, layout):
    assert not races(monkeypatch, size, carrier, layout=layout)


@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1)])
def test_nor_where_ways_are_mixed(monkeypatch, nodes):
    assert not races(monkeypatch, 4, None, nodes)


@contextlib.contextmanager
def unordered(side):
    with side.stream:
        yield side.stream


def without_events(*names):
    original = region.Region.wait

    def wait(self, rank, name, stream):
        if name not in names:
            original(self, rank, name, stream)

    return region.Region, "wait", wait


def nothing(*args, **kwargs):
    pass


def slowly(monkeypatch, *names):
    """Record these events of one rank late, so that whoever is not told waits for the record before."""
    original = region.Region.record

    def record(self, name, stream):
        if name in names and threading.current_thread().name == "rank 1":
            time.sleep(0.5)
        original(self, name, stream)

    monkeypatch.setattr(region.Region, "record", record)


@pytest.mark.parametrize(
    ("events", "size", "change"),
    [
        (("ready",), 3, None),
        (("taken 0", "taken 1"), 6, (peer_memory.PeerMemory, "_await_slot", lambda self: self._expected.pop(0))),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_the_host_must_know_of_a_record(monkeypatch, events, size, change, told):
    slowly(monkeypatch, *events)
    if told:
        assert not races(monkeypatch, size, "ipc", layout="striped")
        return
    if change is None:
        gather = ThreadHost.gather
        change = ThreadHost, "gather", lambda self, note: () if note == b"published" else gather(self, note)
    # Which rank comes first is the machine's choice: a busy one may order what nothing else does.
    assert any(races(monkeypatch, size, "ipc", layout="striped", left_out=change) for _ in range(20))


def posted_at_once():
    original = NcclMessages._post

    def post(self, kind, group):
        group.marks = []
        original(self, kind, group)

    return NcclMessages, "_post", post


def taken_at_once():
    kept = []  # the stand-in's NCCL may still write there

    def wait(self):
        self._messages.before_waiting(self._number, self._groups)
        kept.append(self._groups)
        return self._arriving

    return Exchange, "wait", wait


LEFT_OUT = {
    "a side stream begins behind the caller's": ("ipc", 3, "striped", (streams.Side, "behind_caller", unordered)),
    "the caller goes on behind what was moved": ("ipc", 3, "striped", (streams.Streamed, "wait", lambda self: {})),
    "peers' blocks are ready": ("ipc", 3, "striped", without_events("ready")),
    "peers have read the blocks before": ("ipc", 3, "striped", without_events("done")),
    "gradients have come home": ("ipc", 2, "striped", without_events("home")),
    "gradients have come by a hop": ("ipc", 4, "striped", without_events("hop 0", "hop 1")),
    "a slot is free again": ("ipc", 6, "striped", without_events("taken 0", "taken 1")),
    "the call ends behind its streams": ("ipc", 2, "alone", (streams.Side, "before_caller", nothing)),
    "NCCL begins behind the caller's stream": ("nccl", 3, "striped", posted_at_once()),
    "the caller goes on behind NCCL": ("nccl", 3, "striped", taken_at_once()),
    "MPI gets what was computed": ("mpi", 2, "striped", (cupy.cuda.Stream, "synchronize", nothing)),
    "pinned memory is full before it leaves": ("host", 2, "striped", (cupy.cuda.Event, "synchronize", nothing)),
    "pinned memory is kept until it was read": ("host", 3, "striped", (staging.Staging, "keep", nothing)),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_each_wait_is_needed(monkeypatch, what):
    carrier, size, layout, change = LEFT_OUT[what]
    assert races(monkeypatch, size, carrier, layout=layout, left_out=change)


def test_slots_are_used_in_turn(monkeypatch):
    """With one slot alone, the next accumulators would come before the last ones were read."""
    original = peer_memory.PeerMemory._hop
    monkeypatch.setattr(peer_memory.PeerMemory, "_hop", lambda self, number: original(self, 0))
    assert races(monkeypatch, 4, "ipc", layout="striped")
