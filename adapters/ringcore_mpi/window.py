"""Memory that the ranks of a node share."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from pathlib import Path
from typing import Any

from mpi4py import MPI

from ringcore_mpi.buffers import Bytes, as_bytes

_FOLDER = "/dev/shm"  # where MPI libraries on Linux make shared memory
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14
_NO_SUCH_ADVICE = 22  # EINVAL
PAGE = 4096


class Window:
    """A piece of memory of each rank of ``comm``, which all of them can read; made and freed by all together."""

    def __init__(self, comm: Any, size: int) -> None:
        self.size = max(size, PAGE)
        self._rank = comm.Get_rank()
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})  # each piece on pages of its own, near its rank
        try:
            self._window = MPI.Win.Allocate_shared(self.size, 1, info=info, comm=comm)
        finally:
            info.Free()
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._memory: dict[int, Bytes] = {}

    def memory(self, member: int) -> Bytes:
        """The bytes of that rank of ``comm``."""
        if member not in self._memory:
            buffer, _ = self._window.Shared_query(member)
            self._memory[member] = as_bytes(buffer)
        return self._memory[member]

    @property
    def own(self) -> Bytes:
        """This rank's bytes."""
        return self.memory(self._rank)

    def populate(self) -> bool:
        """Take this rank's memory from the system now; False if there is too little.

        Without it the system would find out at the first write, and end the process with a bus error.
        """
        if not sys.platform.startswith("linux"):
            return True
        library = ctypes.CDLL(None, use_errno=True)
        address, size = ctypes.c_void_p(self.own.ctypes.data), ctypes.c_size_t(self.size)
        failed = library.madvise(address, size, _POPULATE_WRITE) != 0
        return not failed or ctypes.get_errno() == _NO_SUCH_ADVICE

    def sync(self) -> None:
        """Order this rank's reads and writes of the window before those that follow."""
        self._window.Sync()

    def in_use(self) -> bool:
        """Whether any array on this rank still lies in the window."""
        watched = [(member, weakref.ref(memory)) for member, memory in self._memory.items()]
        self._memory.clear()  # every view keeps its memory alive, so what dies here had no view
        alive = {member: memory for member, reference in watched if (memory := reference()) is not None}
        self._memory.update(alive)
        return bool(alive)

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._window.Unlock_all()
        self._window.Free()


def unname_segments() -> None:
    """Take away the name of the segment through which MPICH's ranks of one machine talk; call it once all have it.

    MPICH does so in MPI_Finalize, which a killed rank never reaches: an interrupt would leave the segment behind.
    """
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError:
        return
    for name in {word for word in mapped if word.startswith(f"{_FOLDER}/mpich_shm_")}:
        Path(name).unlink(missing_ok=True)


def free_room() -> int:
    """How many bytes of shared memory this machine can still give."""
    try:
        state = os.statvfs(_FOLDER)
    except (OSError, AttributeError):
        return sys.maxsize  # not limited by a folder: `Window.populate` finds out
    return state.f_bavail * state.f_frsize
