"""The deadline of what only streams wait for, with channels that the test moves on by hand."""

import threading
import time

import pytest
import torch.distributed as dist

from ringcore import PeerError, RingTimeout, TransportError
from ringcore_torch.circle import Circle
from ringcore_torch.watch import Watch

PATIENCE = 10.0


class Channel:
    """Operations that end when the test says so, or when they are aborted."""

    def __init__(self):
        self.posted = self.ended = 0
        self.aborted, self.closed = threading.Event(), threading.Event()

    def passed(self):
        return self.ended

    def under_way(self):
        return self.ended != self.posted

    def abort(self):
        self.ended = self.posted
        self.aborted.set()

    def close(self):
        self.closed.set()


class Watched:
    """A circle, two channels and their watch."""

    made = 0

    def __init__(self, world, timeout):
        Watched.made += 1
        self.circle = Circle(world, f"watch {Watched.made}", PATIENCE)
        dist.barrier()  # else the news of a failure may meet a rank that still makes its own
        self.circle.timeout = timeout
        self.channels = Channel(), Channel()
        self.begun = threading.Event()
        self.watch = Watch(self.circle, self.channels, self.begun)

    def post(self, channel=0):
        self.channels[channel].posted += 1
        self.begun.set()


@pytest.fixture
def watched(world):
    made = []

    def make(timeout):
        made.append(Watched(world, timeout))
        return made[-1]

    yield make
    for one in made:
        one.watch.close()
    dist.barrier()


def test_a_channel_that_stands_still_is_a_timeout_in_the_next_call_and_frees_its_stream(watched):
    ring = watched(0.5)
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        ring.post(1)
        assert all(channel.aborted.wait(PATIENCE) for channel in ring.channels)
        assert isinstance(ring.circle.stopped, RingTimeout)
        with pytest.raises(RingTimeout, match=r"rank 0 waited 0\.5 s for its part in an exchange"):
            ring.circle.gather(b"")
    elif rank == size - 1:
        assert ring.circle.heard(PATIENCE)  # and is told in its next call
        with pytest.raises(PeerError, match=r"rank 0 failed.*RingTimeout"):
            ring.circle.gather(b"")
    else:
        return
    with pytest.raises(TransportError, match="this ring ended"):
        ring.circle.gather(b"")


def test_a_channel_that_moves_on_has_its_deadline_anew(watched):
    ring = watched(2.0)
    for _ in range(16):
        ring.post()
    for _ in range(16):
        time.sleep(0.2)
        ring.channels[0].ended += 1
    time.sleep(0.3)
    ring.circle.check()
    assert not ring.channels[0].aborted.is_set()


def test_time_in_which_nothing_is_under_way_counts_not(watched):
    ring = watched(1.0)
    for _ in range(2):
        time.sleep(1.5)
        ring.post()
        time.sleep(0.2)
        ring.channels[0].ended += 1
    ring.circle.check()


def test_a_peer_that_fails_frees_the_stream_of_every_other(watched):
    ring = watched(PATIENCE * 3)
    if dist.get_world_size() == 1:
        pytest.skip("needs 2 ranks")
    if dist.get_rank() == 0:
        time.sleep(0.3)
        ring.circle.abort(ValueError("the disk is full"))
        ring.watch.abort()
        assert ring.channels[1].aborted.is_set()
    else:
        ring.post()
        assert ring.channels[0].aborted.wait(PATIENCE), "it was heard at the deadline only"
        with pytest.raises(PeerError, match=r"rank 0 failed.*ValueError: the disk is full"):
            ring.circle.check()


def test_a_ring_that_ends_well_closes_once_all_has_ended(watched):
    ring = watched(PATIENCE)
    ring.post()
    time.sleep(0.2)
    ring.watch.close()
    time.sleep(0.3)
    assert not ring.channels[0].closed.is_set()
    ring.channels[0].ended += 1
    assert all(channel.closed.wait(PATIENCE) for channel in ring.channels)
    ring.watch._thread.join(PATIENCE)
    assert not ring.watch._thread.is_alive()
    assert not ring.channels[0].aborted.is_set()


def test_a_ring_that_failed_is_aborted_and_not_closed(watched):
    ring = watched(PATIENCE)
    dist.barrier()
    ring.circle.abort(ValueError("of no concern"))
    ring.watch.close()
    assert all(channel.aborted.wait(PATIENCE) for channel in ring.channels)
    assert not ring.channels[0].closed.is_set()
