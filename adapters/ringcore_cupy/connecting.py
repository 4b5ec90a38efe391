"""A ring's own communicator of NCCL, made within a deadline."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import cupy
import numpy as np
from cupy.cuda import nccl, runtime

from ringcore import RingTimeout, Transport
from ringcore_cupy.notes import gathered, patience

_BETWEEN = 0.1  # seconds between two rounds of notes

Letters = Sequence[tuple[int, Any]]
"""Ranks, and contiguous arrays that go to them or come from them."""


class Connection:
    """This rank's end of a communicator of NCCL."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self._end = weakref.finalize(self, _destroy, communicator)

    def post(self, sends: Letters, receives: Letters, stream: Any) -> None:
        """Post one group on ``stream``. Raises NcclError."""
        self._communicator.check_async_error()
        nccl.groupStart()
        try:
            for peer, x in sends:
                self._communicator.send(x.data.ptr, x.nbytes, nccl.NCCL_UINT8, peer, stream.ptr)
            for peer, x in receives:
                self._communicator.recv(x.data.ptr, x.nbytes, nccl.NCCL_UINT8, peer, stream.ptr)
        finally:  # else all that this thread gives NCCL later, on any communicator, would join the group
            nccl.groupEnd()

    def abort(self) -> None:
        """End all operations as they are, and take no more."""
        with suppress(nccl.NcclError):  # a peer may be gone
            self._communicator.abort()

    def close(self) -> None:
        """Let go of the connections."""
        self._end()


class Attempt(threading.Thread):
    """This rank's part in making a communicator: in a thread, as NCCL waits for ever for a rank that could not."""

    def __init__(self, name: bytes, rank: int, size: int) -> None:
        super().__init__(name="ringcore nccl", daemon=True)
        self._name_of_all, self._rank, self._size, self._device = name, rank, size, runtime.getDevice()
        self._lock, self._given_up = threading.Lock(), False
        self.connection: Connection | None = None
        self.error = ""

    def run(self) -> None:
        """Connect to all ranks, or say in ``error`` why not."""
        try:
            cupy.cuda.Device(self._device).use()  # else a new thread works on the first one
            connection = Connection(nccl.NcclCommunicator(self._size, self._name_of_all, self._rank))
            with self._lock:
                self.connection = connection
                if self._given_up:
                    connection.abort()
                    return
            _shake_hands(connection, self._rank, self._size)
        except Exception as exc:
            self.error = f"rank {self._rank}: {exc}"

    def give_up(self) -> None:
        """End it, at once or when NCCL comes back from making the communicator."""
        with self._lock:
            self._given_up = True
            if self.connection is not None:
                self.connection.abort()


def connect(host: Transport) -> tuple[Connection | None, str]:
    """The ranks' connection by NCCL, or why there is none, on every rank. Collective. Raises RingTimeout."""
    name, error = "", ""
    if host.rank == 0:
        try:
            name = nccl.get_unique_id().hex()
        except nccl.NcclError as exc:
            error = f"rank 0: {exc}"
    name, error = gathered(host, (name, error))[0]
    if error:
        return None, error
    attempt = Attempt(bytes.fromhex(name), host.rank, host.size)
    attempt.start()
    try:
        error = _made(host, attempt)
    except BaseException:
        attempt.give_up()
        raise
    if error:
        attempt.give_up()
        return None, error
    return attempt.connection, ""


def _made(host: Transport, attempt: Attempt) -> str:
    """Wait until all ranks are connected, or one cannot be: why, on every rank.

    They tell each other time and again: a rank that NCCL keeps waiting hears so of one that failed.
    """
    until = time.monotonic() + patience(host)
    while True:
        attempt.join(_BETWEEN)
        ended = not attempt.is_alive()
        notes = gathered(host, (ended, attempt.error, time.monotonic() > until))
        errors = [error for _, error, _ in notes if error]
        missing = [rank for rank, (ended, _, _) in enumerate(notes) if not ended]
        if errors or not missing:
            return "; ".join(errors)
        if any(late for _, _, late in notes):
            raise RingTimeout(
                f"rank {host.rank} waited {patience(host):g} s for all ranks to make their NCCL communicators: the "
                f"ranks {missing} have none. NCCL may find no network between the ranks (NCCL_DEBUG=INFO says more)."
            )


def _shake_hands(connection: Connection, rank: int, size: int) -> None:
    """Let each rank meet all others, at once.

    NCCL connects two ranks at their first message, for which the host waits for the other one; what goes home comes
    from ranks that are no neighbours.
    """
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        peers = [(rank + hop) % size for hop in range(1, size)]
        mine, theirs = ([(peer, cupy.zeros(1, np.uint8)) for peer in peers] for _ in range(2))
        connection.post(mine, theirs, stream)
        stream.synchronize()


def _destroy(communicator: Any) -> None:
    with suppress(nccl.NcclError):
        communicator.destroy()
