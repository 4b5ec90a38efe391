"""A ring's own communicator of NCCL, made within a deadline."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import cupy
import numpy as np
from cupy.cuda import nccl, runtime

from ringcore import RingTimeout, Transport
from ringcore_cupy.notes import gathered, patience

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


def connect(host: Transport) -> tuple[Connection | None, str]:
    """The ranks' connection by NCCL, or why there is none, on every rank. Collective.

    It is made in a thread, as NCCL waits for ever for a rank that could not make its own. Raises RingTimeout.
    """
    name, error = "", ""
    if host.rank == 0:
        try:
            name = nccl.get_unique_id().hex()
        except nccl.NcclError as exc:
            error = f"rank 0: {exc}"
    name, error = gathered(host, (name, error))[0]
    if error:
        return None, error
    found: list[Connection] = []
    failed: list[Exception] = []
    device = runtime.getDevice()

    def attempt() -> None:
        try:
            cupy.cuda.Device(device).use()  # else a new thread works on the first one
            connection = Connection(nccl.NcclCommunicator(host_size, bytes.fromhex(name), host_rank))
            _shake_hands(connection, host_rank, host_size)
            found.append(connection)
        except Exception as exc:
            failed.append(exc)

    host_rank, host_size = host.rank, host.size
    thread = threading.Thread(target=attempt, name="ringcore nccl", daemon=True)
    thread.start()
    thread.join(patience(host))
    if thread.is_alive():
        raise RingTimeout(
            f"rank {host.rank} waited {patience(host):g} s for all ranks to make their NCCL communicators. A rank may "
            "be stuck or gone, or NCCL finds no network between them (NCCL_DEBUG=INFO says more)."
        )
    said = f"rank {host.rank}: {failed[0]}" if failed else ""
    errors = [error for error in gathered(host, said) if error]
    if errors:
        for connection in found:
            connection.abort()
        return None, "; ".join(errors)
    return found[0], ""


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
