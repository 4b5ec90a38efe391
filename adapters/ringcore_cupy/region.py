"""Memory and events of a GPU that other processes of its machine open."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import cupy
from cupy.cuda import runtime

from ringcore_cupy.streams import done_within

_log = logging.getLogger(__name__)

EVENTS = ("ready", "done", "home", "hop 0", "hop 1", "taken 0", "taken 1")

_GRAIN = 1 << 21  # bytes: CUDA shares memory in whole pages, which nothing else of this process may lie in
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_LAST = 5.0  # seconds that memory is kept for peers that still read it


class Region:
    """Memory of this rank's GPU for its peers to open, theirs as opened here, and everybody's events.

    Memory of its own: the handle of an array in CuPy's pool would name the whole block of the pool.
    Made on the current device. Raises CUDARuntimeError if there is too little memory.
    """

    def __init__(self, size: int) -> None:
        self.size = -(-max(1, size) // _GRAIN) * _GRAIN
        self._device = runtime.getDevice()
        self._held = {"memory": _allocated(self.size)}
        self._events = {name: cupy.cuda.Event(disable_timing=True, interprocess=True) for name in EVENTS}
        self._memory: dict[int, int] = {}  # of each peer, where it is mapped here
        self._theirs: dict[int, dict[str, int]] = {}
        self._peers_done = cupy.cuda.Event(disable_timing=True)
        kept = self._peers_done, self._held, self._events, self._memory, self._theirs
        self._end = weakref.finalize(self, _end, self._device, *kept)

    @property
    def own(self) -> Any:
        """Where this rank's memory begins, as a pointer of CuPy's."""
        return cupy.cuda.MemoryPointer(self._held["memory"], 0)

    def note(self) -> dict[str, Any]:
        """What a peer needs to open this rank's memory and events."""
        return {
            "memory": runtime.ipcGetMemHandle(self._held["memory"].ptr).hex(),
            "events": {name: runtime.ipcGetEventHandle(event.ptr).hex() for name, event in self._events.items()},
        }

    def open(self, rank: int, note: Mapping[str, Any]) -> None:
        """Map that peer's memory. Raises CUDARuntimeError if the system does not allow it."""
        self._memory[rank] = runtime.ipcOpenMemHandle(bytes.fromhex(note["memory"]))
        opened = self._theirs[rank] = {}
        for name, handle in note["events"].items():
            opened[name] = runtime.ipcOpenEventHandle(bytes.fromhex(handle))

    def address(self, rank: int) -> int:
        """Where that peer's memory begins in this process."""
        return self._memory[rank]

    def record(self, name: str, stream: Any) -> None:
        """This rank's event, behind all that ``stream`` was given so far."""
        self._events[name].record(stream)

    def wait(self, rank: int, name: str, stream: Any) -> None:
        """What ``stream`` is given from now on begins behind that peer's event.

        The host must know that it was recorded: CUDA does not wait for an event before its first record, and takes the
        last record otherwise.
        """
        runtime.streamWaitEvent(stream.ptr, self._theirs[rank][name])

    def await_peers(self, stream: Any) -> None:
        """What ``stream`` is given from now on, and the end of this region, come behind all peers' "done".

        The host must know that all recorded it. Their events themselves are no longer asked at the end: a peer that
        ended earlier has destroyed its own.
        """
        for rank in self._theirs:
            self.wait(rank, "done", stream)
        self._peers_done.record(stream)

    def let_go(self) -> None:
        """Close what was opened of the peers; nothing of this rank's streams may be under way there."""
        _close(self._memory, self._theirs)

    def close(self) -> None:
        """Free this rank's memory, which no peer has open."""
        if self._end.detach() is not None:
            self._held.clear()

    def leave(self) -> None:
        """Keep everything to the end of the process, as streams of this rank may never come to their end."""
        found = self._end.detach()
        if found is not None:
            _, _, (_, _, *kept), _ = found
            _leave(*kept)


def _allocated(size: int) -> Any:
    try:
        return cupy.cuda.Memory(size)
    except runtime.CUDARuntimeError as error:
        if error.status != _OUT_OF_MEMORY:
            raise
        cupy.get_default_memory_pool().free_all_blocks()  # which keeps what it once had
        return cupy.cuda.Memory(size)


def _leave(*kept: Any) -> None:
    _log.warning("memory that GPUs share is kept to the end of the process: streams still wait for a rank")
    _keep(kept)


def _keep(what: Any) -> None:
    """To the end of the process, past Python's own: to free memory CUDA waits for all that its GPU was given."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))


def _end(
    device: int,
    peers_done: Any,
    held: dict[str, Any],
    own: Mapping[str, Any],
    memory: dict[int, int],
    events: dict[int, dict[str, int]],
) -> None:
    """Give back what is CUDA's, on this rank alone: it runs when the ring goes, or the process ends.

    But not this rank's events: a peer that has just heard of one may be about to wait for it.
    """
    with suppress(runtime.CUDARuntimeError), cupy.cuda.Device(device):
        if not done_within(_LAST, peers_done):  # peers may be behind
            _leave(held, own, memory, events)
            return
        _close(memory, events)
    held.clear()
    _keep(own)


def _close(memory: dict[int, int], events: dict[int, dict[str, int]]) -> None:
    while events:
        _, opened = events.popitem()
        while opened:
            runtime.eventDestroy(opened.popitem()[1])
    while memory:
        runtime.ipcCloseMemHandle(memory.popitem()[1])
