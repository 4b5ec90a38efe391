"""A kept team of threads that share out numbered tasks while BLAS stays at one thread each."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from ringcore import Array

_LINE = 64  # bytes of a cache line, and of the widest vector register


class Scratch:
    """One thread's buffers, kept between calls: taken by name, never cleared."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised array of this shape and dtype, the same memory for the same name."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            raw = np.empty(size + _LINE, dtype=np.uint8)
            start = -raw.ctypes.data % _LINE
            buffer = self._buffers[name] = raw[start : start + size]
        return buffer[:size].view(dtype).reshape(shape)


class Stopped(Exception):  # never leaves this module's team
    """Another thread of the team failed, so this one gives up."""


class Job:
    """One call's tasks, handed out in order.

    Every thread calls `check` between tiles, so that an error or Ctrl-C in one ends all of them soon.
    """

    def __init__(self, count: int) -> None:
        self.error: BaseException | None = None
        self._count = count
        self._next = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise Stopped if a thread of the team has failed."""
        if self.error is not None:
            raise Stopped

    def labour(self, work: Callable[[int, Scratch, Job], None]) -> None:
        """Do tasks until none is left; errors are kept for the caller's thread."""
        try:
            scratch = _own_scratch()
            with np.errstate(all="ignore"):  # NumPy keeps this per thread
                while self.error is None:
                    with self._lock:
                        task = self._next
                        self._next += 1
                    if task >= self._count:
                        return
                    work(task, scratch, self)
        except Stopped:
            return
        except BaseException as error:
            if self.error is None:
                self.error = error


class Team:
    """``threads`` threads, the caller's among them; the others start at the first call and are kept."""

    def __init__(self, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; a team needs at least 1.")
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        _teams.add(self)

    def run(self, count: int, work: Callable[[int, Scratch, Job], None]) -> None:
        """Call ``work(task, scratch, job)`` for every task in [0, count); raises the first error."""
        job = Job(count)
        helpers = min(self.threads, count) - 1
        with _blas_on_one_thread():
            futures: list[Future[None]] = []
            try:
                for _ in range(helpers):
                    futures.append(self._helpers().submit(job.labour, work))
                job.labour(work)
                _await(futures)
            except BaseException as error:  # no new thread, or Ctrl-C between two tasks
                job.error = job.error or error
                _await(futures)
        if job.error is not None:
            raise job.error

    def _helpers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self.threads - 1, thread_name_prefix="ringcore-numpy", initializer=_blas.calm_this_thread
                )
            return self._pool

    def forget(self) -> None:
        """Drop the pool without joining it: after a fork its threads do not exist."""
        self._pool = None
        self._lock = threading.Lock()


def _await(futures: list[Future[None]]) -> None:
    for future in futures:
        if not future.cancel():  # one that has not begun would find no task left
            future.result()


def _own_scratch() -> Scratch:
    if not hasattr(_local, "scratch"):
        _local.scratch = Scratch()
    scratch: Scratch = _local.scratch
    return scratch


class _Blas:
    """The BLAS libraries of this process, and how many calls now hold them at one thread.

    Counted, because calls overlap where several ranks are threads of one process: each alone would restore the
    limit that another has set. The libraries' own controllers are used, because threadpoolctl's limits work only
    in the thread that first set one, and the last call to end need not be in the thread of the first to begin.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self._shared: list[tuple[Any, int]] = []  # set for the whole process; with what to restore
        self._own: list[Any] = []  # set for each thread by itself
        self._found = False

    def find(self) -> None:
        """Look for the libraries, once: it takes milliseconds."""
        if self._found:
            return
        for library in ThreadpoolController().select(user_api="blas").lib_controllers:
            if getattr(library, "threading_layer", None) == "openmp":
                self._own.append(library)
            else:
                self._shared.append((library, 1))
        self._found = True

    def take(self) -> None:
        """One more call begins."""
        if self.calls == 0:
            self._shared = [(library, library.get_num_threads() or 1) for library, _ in self._shared]
            for library, _ in self._shared:
                _set(library, 1)
        self.calls += 1

    def release(self) -> None:
        """A call ends; the last one restores what there was."""
        self.calls -= 1
        if self.calls == 0:
            for library, before in self._shared:
                _set(library, before)

    def calm_this_thread(self) -> list[tuple[Any, int]]:
        """Set what each thread sets for itself; gives what to restore."""
        before = [(library, library.get_num_threads() or 1) for library in self._own]
        for library in self._own:
            _set(library, 1)
        return before


def _set(library: Any, threads: int) -> None:
    # From version 3.8 on a library of threadpoolctl obeys one thread alone, until that lets go or is made to.
    let_go = getattr(library, "clear_controlling_thread", None)
    if let_go is not None:
        let_go(force=True)
    library.set_num_threads(threads)
    if let_go is not None:
        let_go(force=True)


@contextmanager
def _blas_on_one_thread() -> Iterator[None]:
    with _blas.lock:
        _blas.find()
        _blas.take()
    try:
        own = _blas.calm_this_thread()
        try:
            yield
        finally:
            for library, before in own:
                _set(library, before)
    finally:
        with _blas.lock:
            _blas.release()


def _after_fork() -> None:
    _blas.lock = threading.Lock()
    if _blas.calls:  # forked while another thread computed, which does not exist here
        _blas.calls = 1
        _blas.release()
    for team in list(_teams):
        team.forget()


_local = threading.local()
_teams: weakref.WeakSet[Team] = weakref.WeakSet()
_blas = _Blas()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
