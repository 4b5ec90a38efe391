"""A thread that moves large messages on while tiles are computed."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Protocol

from mpi4py import MPI

from ringcore_mpi.line import give_way


class Testable(Protocol):
    """Something under way that moves on when it is tested."""

    def test(self) -> bool:
        """Whether it has finished."""
        ...


class Progress:
    """Tests what is under way, again and again, on a core that has nothing else to do.

    MPI libraries move large messages only inside a call into MPI. The thread is started by the first `add`.
    """

    def __init__(self) -> None:
        self._under_way: list[Testable] = []
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, item: Testable) -> None:
        """Move this on from now on."""
        with self._lock:
            self._under_way.append(item)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ringcore-mpi", daemon=True)
            self._thread.start()
        self._work.set()

    def remove(self, item: Testable) -> None:
        """Leave this alone; once it returns, the thread does not touch the item again."""
        with self._lock:
            if item in self._under_way:
                self._under_way.remove(item)

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._work.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                if not self._under_way:
                    self._work.clear()
                for item in list(self._under_way):
                    # What failed fails again, and is told, in the wait of the caller's thread.
                    finished = True
                    with suppress(MPI.Exception):
                        finished = item.test()
                    if finished:
                        self._under_way.remove(item)
            if self._work.is_set():
                give_way()
            else:
                self._work.wait()


def has_free_core(sharers: int) -> bool:
    """Whether each of ``sharers`` ranks on this machine has a core beyond those that its kernels use.

    The kernels take every core of a rank unless OMP_NUM_THREADS says otherwise.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = os.environ.get("OMP_NUM_THREADS", "").strip()
    return chosen.isdecimal() and 0 < int(chosen) < cores // sharers


def threads_allowed() -> bool:
    """Whether MPI was started so that two threads may call it at once."""
    return bool(MPI.Query_thread() >= MPI.THREAD_MULTIPLE)
