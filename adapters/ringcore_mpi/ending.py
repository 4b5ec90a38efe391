"""The end of the process, and of MPI in it."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

from mpi4py import MPI

_tasks: list[WeakMethod[Callable[[], None]]] = []
_state = {"ending": False, "registered": False}


def at_exit(task: Callable[[], None]) -> None:
    """Run this method before MPI ends, be it with the process or earlier, on this rank alone, if its object lives.

    Nothing is freed together then: a rank that left early would keep the others waiting. The system takes back what
    windows hold, which have no name that could be left behind.
    """
    if not _state["registered"]:
        _state["registered"] = True
        atexit.register(_end)
        # MPI deletes the attributes of COMM_SELF first thing in MPI_Finalize.
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_end_of_mpi), True)
    _tasks[:] = [known for known in _tasks if known() is not None]
    _tasks.append(WeakMethod(task))


def ending() -> bool:
    """Whether the process, or MPI in it, is coming to its end."""
    return _state["ending"]


def _end() -> None:
    _state["ending"] = True
    for known in _tasks:
        task = known()
        if task is not None:
            task()


def _end_of_mpi(comm: Any, keyval: int, value: Any) -> None:
    _end()
