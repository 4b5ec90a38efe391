"""The end of the process, and of MPI in it."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

_tasks: list[Callable[[], None]] = []
_state = {"ending": False}


def at_exit(task: Callable[[], None]) -> None:
    """Run this before MPI ends, be it with the process or earlier, on this rank alone.

    Nothing is freed together then: a rank that left early would keep the others waiting. The system takes back what
    windows hold, which have no name that could be left behind.
    """
    if not _tasks:
        atexit.register(_end)
        # MPI deletes the attributes of COMM_SELF first thing in MPI_Finalize.
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_end_of_mpi), True)
    _tasks.append(task)


def ending() -> bool:
    """Whether the process, or MPI in it, is coming to its end."""
    return _state["ending"]


def _end() -> None:
    _state["ending"] = True
    for task in _tasks:
        task()


def _end_of_mpi(comm: Any, keyval: int, value: Any) -> None:
    _end()
