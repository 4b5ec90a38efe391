"""Communicators that one rank cannot make: all hear of it long before their deadline, and why."""

import threading
import time

import cupy
import pytest
from cupy.cuda import nccl
from test_order import call
from thread_host import ThreadHost, in_threads

from ringcore import RingTimeout, UnsupportedError
from ringcore_cupy import CupyTransport

WHY = "NCCL failed: rank 1: .*this rank finds no network"


@pytest.fixture
def one_fails(monkeypatch, tmp_path):
    """Rank 1 cannot make its communicator, or not send by it; NCCL keeps the others waiting."""
    monkeypatch.setattr(nccl, "_FOLDER", tmp_path)
    monkeypatch.setattr(nccl, "_DEADLINE", 5)

    class Failing(nccl.NcclCommunicator):
        where = ""

        def __init__(self, size, name, rank):
            self.fail("making", rank)
            super().__init__(size, name, rank)

        def send(self, *arguments):
            self.fail("meeting", self._rank)
            super().send(*arguments)

        def fail(self, where, rank):
            if (where, rank) == (self.where, 1):
                raise nccl.NcclError(3, "this rank finds no network")

    monkeypatch.setattr(nccl, "NcclCommunicator", Failing)
    yield Failing
    for thread in threading.enumerate():
        if thread.name == "ringcore nccl":
            thread.join(20)


def rank_of(world, rank, carrier):
    ring = CupyTransport(ThreadHost(world, rank, nodes=range(world.size)), carrier=carrier)
    started = time.monotonic()
    if carrier is not None:
        with pytest.raises(UnsupportedError, match=WHY):
            call(ring, 0, "striped")
    else:
        call(ring, 0, "striped")
    return time.monotonic() - started, ring.explain


@pytest.mark.parametrize("where", ["making", "meeting"])
@pytest.mark.parametrize("carrier", [None, "nccl"])
def test_one_rank_that_fails_is_heard_at_once(one_fails, where, carrier):
    one_fails.where = where
    for seconds, said in in_threads(3, rank_of, carrier):
        assert seconds < 10, "the deadline is 20 s"
        if carrier is None:
            assert "pinned memory" in said
            assert "this rank finds no network" in said


def test_a_rank_that_stands_still_is_a_timeout_on_all(monkeypatch, one_fails):
    monkeypatch.setattr(ThreadHost, "timeout", 0.5)
    monkeypatch.setattr(one_fails, "fail", lambda self, where, rank: time.sleep(3 * (rank == 1)))

    def late(world, rank):
        with pytest.raises(RingTimeout, match=r"waited 0.5 s for all ranks.*the ranks \[0, 1, 2\] have none"):
            rank_of(world, rank, None)

    in_threads(3, late)


def test_one_name_that_cannot_be_made_is_heard_too(monkeypatch):
    def unnamed():
        raise nccl.NcclError(2, "no interface")

    monkeypatch.setattr(cupy.cuda.nccl, "get_unique_id", unnamed)
    for _, said in in_threads(2, rank_of, None):
        assert "NCCL failed: rank 0: NCCL_ERROR_2: no interface" in said
