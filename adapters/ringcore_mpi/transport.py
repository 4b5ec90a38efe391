"""The MPI transport: one rank's end of a ring."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from ringcore import Blocks, KeywordError, Move, RingTimeout, Spec, TransportError
from ringcore_mpi.buffers import check_array, size_of
from ringcore_mpi.circle import Circle
from ringcore_mpi.device_memory import takes_device_memory
from ringcore_mpi.ending import at_exit
from ringcore_mpi.launcher import check_launcher
from ringcore_mpi.line import FIRST_BLOCK_TAG, Line, give_way
from ringcore_mpi.messages import KINDS, Exchange
from ringcore_mpi.places import find_places
from ringcore_mpi.progress import Progress, has_free_core, threads_allowed
from ringcore_mpi.reduction import reduced
from ringcore_mpi.sharing import Sharing


class MpiTransport:
    """A ring over an MPI communicator; implements `ringcore.OneSided`.

    comm: an intracommunicator, such as MPI.COMM_WORLD or a part of it. It is duplicated, so that the ring's messages
        never meet yours. Ranks count within it.
    node: ranks with equal numbers read each other's blocks in shared memory. None takes the machines as they are; on
        one machine other numbers let it act as several.
    timeout: seconds that a rank waits for its peers; None takes RINGCORE_TIMEOUT from the environment, or 120.
    shared: False sends messages within a machine too.
    progress: whether a thread moves messages on while tiles are computed. None starts one where a core is free: if
        OMP_NUM_THREADS is smaller than the rank's share of the machine's cores.
    device_buffers: whether this MPI library takes a GPU's memory (it is "CUDA-aware"). None asks the library. Given
        such memory, one that is not ends the process: say True only if you know, such as from your MPI's manual.
        CuPy's arrays then go as messages; whatever computes or reads them must have ended before they are given.

    Making one is collective, and so is `close`. One call at a time: a second thread needs a ring of its own.

    Attributes: rank, size, node, sharers as in `ringcore.Transport`; timeout in seconds; device_buffers, whether a
    GPU's memory may be given; messages_sent and bytes_sent count blocks that left as messages, bytes_published those
    that were made readable in place.
    Raises TransportError if there is no ring to be had: COMM_NULL, an intercommunicator, a foreign launcher.
    """

    def __init__(
        self,
        comm: Any,
        *,
        node: int | None = None,
        timeout: float | None = None,
        shared: bool = True,
        progress: bool | None = None,
        device_buffers: bool | None = None,
    ) -> None:
        check_communicator(comm)
        self.timeout = _timeout(timeout)
        self.device_buffers = _device_buffers(device_buffers)
        self._line = Line(_duplicate(comm, self.timeout), self.timeout)
        with self._line.operation("making the ring"):
            whole = Circle(self._line, range(self._line.size))
            self._places = find_places(self._line.comm, whole, node, shared)
        self._whole = whole
        self._sharing = Sharing(self._places, whole, Circle(self._line, self._places.members))
        self.rank, self.size, self.node = self._line.rank, self._line.size, self._places.node
        self.sharers = len(self._places.neighbours)
        self._line.crowded = self.sharers > len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True
        wanted = has_free_core(self.sharers) if progress is None else progress
        self._progress = Progress() if wanted and threads_allowed() and self.size > 1 else None
        self.messages_sent = self.bytes_sent = self.bytes_published = self.reductions = 0
        self._closed = False
        at_exit(self._stop_thread)

    @property
    def explain(self) -> str:
        """How blocks travel, and why so."""
        thread = "a thread moves them on" if self._progress else "they move on while this rank waits"
        return f"MPI, rank {self.rank} of {self.size}; {self._sharing.explain()}; messages: {thread}"

    @property
    def windows(self) -> int:
        """How many shared windows this rank has a part in."""
        return self._sharing.windows

    def check(self, *arrays: Any) -> None:
        """Raise UnsupportedError unless all are NumPy's arrays, or Torch's in host memory, or CuPy's where MPI can."""
        for x in arrays:
            check_array(x, self.device_buffers)

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note, in the order of ranks."""
        with self._line.operation("gather"):
            return self._whole.gather("gather", note)

    def exchange(
        self,
        kind: str,
        sends: Sequence[tuple[Move, Blocks]],
        receives: Sequence[tuple[Move, Sequence[Spec]]],
    ) -> Exchange:
        """Start all sends and receives; blocks stay untouched until the answer's wait returns.

        Raises UnsupportedError for arrays that `check` refuses.
        """
        self.check(*(x for _, blocks in sends for x in blocks), *(spec.like for _, specs in receives for spec in specs))
        with self._line.operation("exchange"):
            under_way = Exchange(self._line, self._progress, kind, sends, receives)
            self.messages_sent += under_way.messages
            self.bytes_sent += under_way.bytes
            return under_way

    def reduce(self, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """``combine`` of all ranks' x in the order of ranks, by one reduction of MPI's; None if x is not NumPy's."""
        if not isinstance(x, np.ndarray):
            return None
        with self._line.operation("reduce"):
            self.reductions += 1
            return reduced(self._line, np.ascontiguousarray(x), combine)

    def abort(self, error: BaseException) -> None:
        """Tell every peer that this rank failed; the ring is of no use afterwards."""
        self._line.fail(error)

    def reaches(self, reader: int, owner: int) -> bool:
        """Whether ``reader`` can fetch what ``owner`` publishes; equal on every rank."""
        return self._sharing.reaches(reader, owner)

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]] | None = None,
    ) -> bool:
        """Make this rank's blocks readable on its node. Collective over the ring. What is carried goes as messages.

        False, on every rank, if no node of the ring has shared memory or room in it. Where only some have, `reaches`
        tells which. Raises UnsupportedError for arrays other than NumPy's and Torch's in host memory.
        """
        if not self._places.sharing:
            return False
        with self._line.operation("publish"):
            published = self._sharing.publish(blocks, specs)
            self._line.published = published
            if published:
                self.bytes_published += sum(map(size_of, specs[self.rank]))
            return published

    def fetch(self, owner: int, rows: slice | None, seen: slice | None = None) -> Blocks:
        """The blocks that ``owner`` published, in place; NumPy arrays are read-only, do not write to Torch's."""
        self._line.check()
        return self._sharing.fetch(owner, rows)

    def retire(self) -> None:
        """No rank reads published blocks after this. Collective."""
        with self._line.operation("retire"):
            self._sharing.retire()
            self._line.published = False

    def allocate(self, specs: Mapping[int, Sequence[Spec]]) -> Blocks | None:
        """New arrays in shared memory for this rank's blocks, which `publish` then need not copy. Collective.

        ``specs`` holds what each rank publishes. None means that this rank's node shares no memory, or has no room.
        """
        if not self._places.sharing:
            return None
        with self._line.operation("allocate"):
            return self._sharing.allocate(specs)

    def close(self) -> None:
        """Free the windows, but for those in which arrays still lie, and the communicator. Collective.

        A ring that was found by its communicator is closed when that is freed; one that is never closed lasts until
        the process ends, which frees everything too.
        """
        if self._closed:
            return
        self._closed = True
        self._stop_thread()
        if self._line.stopped is not None:  # peers may be gone: nothing that they would have to take part in
            return
        with self._line.operation("close"):
            self._sharing.close()
            self._places.comm.Free()
            self._line.comm.Free()
        self._line.stopped = TransportError("it was closed")

    def _stop_thread(self) -> None:
        if self._progress is not None:
            self._progress.close()


def check_communicator(comm: Any) -> None:
    """Refuse what no ring can be made of. Raises TransportError."""
    if not isinstance(comm, MPI.Comm) or comm == MPI.COMM_NULL:
        raise TransportError(
            f"the ring is {'MPI.COMM_NULL' if isinstance(comm, MPI.Comm) else type(comm).__name__}; it must be a "
            "communicator that this process belongs to. Ranks outside of the ring must not make the call."
        )
    if comm.Is_inter():
        raise TransportError("the ring is an intercommunicator; a ring needs one group. Give comm.Merge().")
    check_launcher()
    tags, due = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB), FIRST_BLOCK_TAG + len(KINDS) * comm.Get_size()
    if tags is not None and due > tags:
        raise TransportError(f"a ring of {comm.Get_size()} ranks needs {due} tags, but this MPI library has {tags}.")


def _timeout(given: float | None) -> float:
    text = os.environ.get("RINGCORE_TIMEOUT", "120") if given is None else given
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        name = "RINGCORE_TIMEOUT" if given is None else "timeout"
        raise KeywordError(f"{name} is {text!r}; it must be a number of seconds above 0.")
    return seconds


def _device_buffers(given: bool | None) -> bool:
    if given is None:
        return takes_device_memory()
    if not isinstance(given, bool):  # a word that is taken for True would end the process
        raise KeywordError(f"device_buffers is {given!r}; it must be True, False or None.")
    return given


def _duplicate(comm: Any, timeout: float) -> Any:
    duplicate, request = comm.Idup()
    until = time.monotonic() + timeout
    while not request.Test():
        if time.monotonic() > until:
            raise RingTimeout(
                f"rank {comm.Get_rank()} waited {timeout:g} s for all {comm.Get_size()} ranks to enter the ring. Every "
                "rank of the communicator must make the call."
            )
        give_way()
    return duplicate
