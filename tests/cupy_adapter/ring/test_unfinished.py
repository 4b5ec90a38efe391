"""Streams that never come to their end, as when they wait for a rank that died: no call waits with them."""

import gc
import threading
import time
from concurrent.futures import Future

import cupy
import pytest
from happens_before import traced
from test_order import call
from thread_host import ThreadHost, in_threads

from ringcore import RingTimeout
from ringcore_cupy import CupyTransport, region, shared_region

runtime = cupy.cuda.runtime


@pytest.fixture
def stuck(monkeypatch):
    """What makes a stream wait for ever; ended with the test."""
    monkeypatch.setattr(shared_region, "_LAST", 0.2)
    futures, before = [], set(runtime._maps)

    def stop(stream):
        futures.append(Future())
        runtime.streams_work.setdefault(stream.ptr, []).append(futures[-1])

    yield stop
    for future in futures:
        future.set_result(None)
    for address in set(runtime._maps) - before:
        runtime.free(address)


def called(world, rank):
    """A ring after a call."""
    host = ThreadHost(world, rank)
    ring = CupyTransport(host, carrier="ipc")
    call(ring, 0, "striped")
    return host, ring


@pytest.mark.parametrize("which", ["_pulling", "_pushing", "the caller's"])
def test_a_failed_call_leaves_what_streams_may_use(monkeypatch, stuck, caplog, which):
    before, gates = set(runtime._maps), threading.Barrier(2)

    def fail(world, rank):
        _, ring = called(world, rank)
        gates.wait(20)
        if rank:
            near = ring._carriers._near
            stuck(getattr(near, which).stream if hasattr(near, which) else cupy.cuda.get_current_stream())
        started = time.monotonic()
        ring.abort(ZeroDivisionError())
        return time.monotonic() - started

    with traced(monkeypatch):
        assert max(in_threads(2, fail)) < 2
        gc.collect()
        assert len(set(runtime._maps) - before) == 1, "that of the rank whose stream is stuck"
    assert caplog.text.count("memory that GPUs share is kept to the end of the process") == 1


def test_what_peers_may_still_read_is_not_freed(monkeypatch, stuck, caplog):
    monkeypatch.setattr(region, "_LAST", 0.2)
    before, gates = set(runtime._maps), threading.Barrier(2)

    def end(world, rank):
        _, ring = called(world, rank)
        gates.wait(20)
        if rank:  # "done" of the peer is not reached
            stuck(ring._carriers._near._pulling.stream)
            ring._carriers._near._shared.region.await_peers(ring._carriers._near._pulling.stream)
        gates.wait(20)

    with traced(monkeypatch):
        in_threads(2, end)
        gc.collect()
        assert len(set(runtime._maps) - before) == 1
    assert caplog.text.count("memory that GPUs share is kept to the end of the process") == 1


def test_closing_has_a_deadline(monkeypatch, stuck):
    monkeypatch.setattr(ThreadHost, "timeout", 0.5)

    def close(world, rank):
        host, ring = called(world, rank)
        if rank:
            stuck(ring._carriers._near._pulling.stream)
            with pytest.raises(RingTimeout, match=r"rank 1 waited 0.5 s for its GPU.*Make another ring"):
                ring.close()
            host.gather(b"closed")
        else:
            ring.close()

    with traced(monkeypatch):
        in_threads(2, close)
