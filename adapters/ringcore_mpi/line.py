"""One ring's line to its peers: the duplicated communicator, deadlines, and news of failure."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from ringcore import PeerError, RingTimeout, TransportError

ABORT_TAG = 0
CONTROL_TAG = 1
FIRST_BLOCK_TAG = 2

_LONGEST_NEWS = 4000  # bytes: small enough that every MPI library sends it without waiting for the receiver
_CALLS_TO_CATCH_UP = 6
_FAREWELL = 1.0  # seconds in which the news of a failure must have left

_abandoned: list[Any] = []  # requests that could not be cancelled, with their buffers: MPI may still touch them


class Cancellable(Protocol):
    """Something with requests under way."""

    def cancel(self) -> None:
        """Give up all requests."""
        ...


class Line:
    """A communicator that belongs to one ring alone; every wait on it is polled and has a deadline.

    crowded: whether ranks outnumber cores on this machine, so that a waiting rank should soon sleep.
    open: what is under way. published: whether peers may be reading this rank's window.
    """

    def __init__(self, comm: Any, timeout: float) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.timeout = timeout
        self.crowded = False
        self.open: list[Cancellable] = []
        self.published = False
        self.stopped: BaseException | None = None
        self._intrusion: TransportError | None = None
        self._told = False
        self._owner = 0
        self._lock = threading.Lock()

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """One operation of one thread; if it fails, every peer is told and the line is closed for good."""
        self.check()
        self._enter(name)
        try:
            self.catch_up()
            yield
        except MPI.Exception as error:
            failure = TransportError(f"MPI failed in {name} on rank {self.rank}: {error}. Every rank stops.")
            self.fail(failure)
            raise failure from error
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self._lock.release()

    def check(self) -> None:
        """Raise TransportError if an earlier call ended this ring."""
        if self.stopped is not None:
            raise TransportError(
                f"this ring ended when an earlier call failed ({_describe(self.stopped)}). Make a new one, on every "
                "rank: ring=comm.Dup()."
            ) from self.stopped

    def poll(self, ready: Callable[[], bool], waiting_for: Callable[[], str]) -> None:
        """Return once ``ready()`` is true; raises RingTimeout at the deadline, PeerError if a peer failed."""
        if ready():
            return
        start = time.monotonic()
        spin = 0.0005 if self.crowded else 0.02
        pause, turn = 0.00002, 0
        while not ready():
            turn += 1
            elapsed = time.monotonic() - start
            if turn % 16 == 0 or elapsed > spin:
                self.listen()
            if elapsed >= self.timeout:
                raise RingTimeout(
                    f"rank {self.rank} waited {self.timeout:g} s for {waiting_for()}. A rank may be stuck, gone, or "
                    "not have made this call; if it is only slow, raise RINGCORE_TIMEOUT (seconds)."
                )
            if elapsed > spin:
                time.sleep(pause)
                pause = min(pause * 1.25, 0.0005)
            else:
                give_way()

    def listen(self) -> None:
        """Raise PeerError if a peer has told that it failed, TransportError if another thread intruded."""
        self._heed_intruder()
        message = self.comm.Improbe(source=MPI.ANY_SOURCE, tag=ABORT_TAG)
        if message is None:
            return
        status = MPI.Status()
        news = bytearray(_LONGEST_NEWS)
        message.Recv([news, MPI.BYTE], status)
        text = bytes(news[: status.Get_count(MPI.BYTE)]).decode(errors="replace")
        self._told = True  # that rank tells all others itself
        raise PeerError(f"rank {status.Get_source()} failed, so rank {self.rank} stopped too: {text}")

    def catch_up(self) -> None:
        """Listen for news that came while this rank was elsewhere.

        A late rank must not go on with what a failed peer left behind. MPI libraries take in about one message for
        each call, and the news may come behind others.
        """
        for _ in range(_CALLS_TO_CATCH_UP):
            self.listen()

    def fail(self, error: BaseException) -> None:
        """Close the line: give up what is under way and tell every peer. Only the first failure counts."""
        if self.stopped is not None:
            return
        self.stopped = error
        for pending in self.open:
            with suppress(MPI.Exception):
                pending.cancel()
        self.open.clear()
        if self._told:
            return
        self._told = True
        news = np.frombuffer(_describe(error).encode()[:_LONGEST_NEWS], dtype=np.uint8)
        with suppress(MPI.Exception):
            requests = [
                self.comm.Isend([news, MPI.BYTE], peer, ABORT_TAG) for peer in range(self.size) if peer != self.rank
            ]
            _abandoned.append((requests, news))
            until = time.monotonic() + _FAREWELL
            while not MPI.Request.Testall(requests) and time.monotonic() < until:
                give_way()

    def _enter(self, name: str) -> None:
        entered = self._lock.acquire(blocking=False)
        busy = bool(self.open) or self.published
        if entered and not (busy and self._owner != threading.get_ident()):
            self._owner = threading.get_ident()
            return
        if entered:
            self._lock.release()
        # No MPI call from this thread, which MPI might not allow: the thread that came first tells the peers.
        self._intrusion = TransportError(
            f"{name} was called on rank {self.rank} while another thread is in a call on the same ring. One call at a "
            "time per ring: give the second thread a ring of its own (comm.Dup())."
        )
        raise self._intrusion

    def _heed_intruder(self) -> None:
        if self._intrusion is not None:
            raise TransportError(str(self._intrusion))


def give_up(sends: list[Any], receives: list[Any], buffers: Any) -> None:
    """Cancel receives and let go of sends; what MPI may still touch stays alive."""
    unfinished = [request for request in receives if not request.Test()]
    for request in unfinished:
        request.Cancel()
    unfinished += [request for request in sends if not request.Test()]
    if unfinished:
        _abandoned.append((unfinished, buffers))


def keep(*objects: Any) -> None:
    """Keep what MPI may still touch alive, for ever."""
    _abandoned.append(objects)


def give_way() -> None:
    """Let another process or thread have the core."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
