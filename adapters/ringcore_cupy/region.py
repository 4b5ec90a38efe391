"""Memory and events of a GPU that other processes of its machine open."""

from __future__ import annotations

import ctypes
import logging
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import cupy
from cupy.cuda import runtime

_log = logging.getLogger(__name__)

EVENTS = ("ready", "done", "home", "hop 0", "hop 1", "taken 0", "taken 1")

_GRAIN = 1 << 21  # bytes: CUDA shares memory in whole pages, which nothing else of this process may lie in
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_NOT_READY = 600  # cudaErrorNotReady
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
        kept = self._held, self._events, self._memory, self._theirs
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

    def let_go(self) -> None:
        """Close what was opened of the peers; nothing of this rank's streams may be under way there."""
        _close(self._memory, self._theirs)

    def close(self) -> None:
        """Close and free everything, once the peers are done with this rank's memory, as far as their events tell."""
        self._end()

    def leave(self) -> None:
        """Keep everything to the end of the process, as streams of this rank may never come to their end."""
        found = self._end.detach()
        if found is not None:
            _, _, (_, *kept), _ = found
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
    # Not even Python's own end may free it: CUDA would first wait for all that this GPU was given.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _end(
    device: int, held: dict[str, Any], own: Mapping[str, Any], memory: dict[int, int], events: dict[int, dict[str, int]]
) -> None:
    """Give back what is CUDA's, on this rank alone: it runs when the ring goes, too, or the process ends."""
    with suppress(runtime.CUDARuntimeError), cupy.cuda.Device(device):
        # Peers may be behind: their last event tells when they have read what they need.
        until = time.monotonic() + _LAST
        while time.monotonic() < until and any(
            runtime.eventQuery(theirs["done"]) == _NOT_READY for theirs in events.values()
        ):
            time.sleep(0.001)
        _close(memory, events)
    held.clear()


def _close(memory: dict[int, int], events: dict[int, dict[str, int]]) -> None:
    while events:
        _, opened = events.popitem()
        while opened:
            runtime.eventDestroy(opened.popitem()[1])
    while memory:
        runtime.ipcCloseMemHandle(memory.popitem()[1])
