"""A deadline for what only streams wait for."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from ringcore import PeerError, RingTimeout
from ringcore_torch.circle import Circle

_INTERVAL = 0.1  # seconds between two looks
_LAST = 5.0  # seconds that the end of the process waits for the channels to close


_going: set[Watch] = set()


def _close_all() -> None:
    """All at once: to close a channel takes every rank of its ring, and ranks may have made theirs in any order.

    A thread that is still within NCCL when the interpreter ends takes the process down with it.
    """
    going, deadline = list(_going), time.monotonic() + _LAST
    for watch in going:
        watch.close()
    for watch in going:
        watch.ended(deadline)


class Watched(Protocol):
    """A channel whose operations the GPU runs by itself."""

    def passed(self) -> int:
        """How far it is; a number that changes whenever an operation ends."""
        ...

    def under_way(self) -> bool:
        """Whether an operation was posted and has not ended."""
        ...

    def abort(self) -> None:
        """End all operations as they are, and take no more."""
        ...

    def close(self) -> None:
        """Let go of the connections, once the peers have what was sent."""
        ...


class Watch:
    """A thread that ends a ring whose channels stand still, or one of whose ranks failed.

    The host waits for nothing there, and whoever waits for the GPU waits for ever if a peer never comes. So this
    thread looks how far the channels are, in host memory that the streams write: it must ask the GPU nothing, which
    would disturb a capture, or wait behind those who wait. When it has ended the operations their streams go on, and
    the next call raises the reason.

    The deadline counts from when an operation was posted, or from when the one before it on any channel ended, so that
    what else the GPU was given in between counts too.
    begun: set whenever an operation was posted.
    """

    def __init__(self, circle: Circle, channels: Sequence[Watched], begun: threading.Event) -> None:
        self._circle, self._channels, self._begun = circle, channels, begun
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._aborted = False
        self._thread = threading.Thread(target=self._run, name="ringcore deadline", daemon=True)
        self._thread.start()
        if not _going:
            atexit.unregister(_close_all)
            atexit.register(_close_all)  # what is registered later, to end torch.distributed say, comes before
        _going.add(self)

    def abort(self) -> None:
        """End all operations, on this rank."""
        with self._lock:
            if not self._aborted:
                self._aborted = True
                for channel in self._channels:
                    channel.abort()

    def close(self) -> None:
        """Close the channels once what is under way has ended; nobody waits for that."""
        self._closing.set()
        self._begun.set()

    def ended(self, deadline: float) -> None:
        """Wait until the channels are closed, or until then (monotonic)."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        going_on = True
        while going_on and not self._closing.is_set():
            self._begun.wait()
            self._begun.clear()
            going_on = self._followed()
        if going_on and self._circle.stopped is None:
            with self._lock:
                if not self._aborted:
                    self._aborted = True
                    for channel in self._channels:
                        channel.close()
        self.abort()
        _going.discard(self)

    def _followed(self) -> bool:
        """Look until nothing is under way; False if the ring ended first."""
        since, passed = time.monotonic(), [channel.passed() for channel in self._channels]
        while any(channel.under_way() for channel in self._channels):
            now = [channel.passed() for channel in self._channels]
            if now != passed:
                since, passed = time.monotonic(), now
            error: PeerError | RingTimeout | None = self._circle.heard()
            if error is None and time.monotonic() - since > self._circle.timeout:
                error = self._circle.late("its part in an exchange of blocks between GPUs")
            if error is not None:
                self._circle.end(error)
            if self._circle.stopped is not None:
                return False
            time.sleep(_INTERVAL)
        return True
