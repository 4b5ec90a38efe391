"""Lets tasks that run at once add to the same rows in a fixed order."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

from ringcore_numpy.threads import Job

EVERYTHING = 1 << 62
"""A progress beyond every position."""

_PATIENCE = 0.05  # seconds between looks for an error in the task that is waited for


class Order:
    """How far each task has come; tasks are begun in order, so the earliest never waits.

    heads: what each task adds to; only tasks of equal heads wait for each other, unless asked otherwise.
    """

    def __init__(self, heads: Sequence[Hashable]) -> None:
        self._heads = heads
        self._progress = [0] * len(heads)  # positions below it are done
        self._unfinished = 0  # all tasks below it are done
        self._moved = threading.Condition()

    def passed(self, task: int, position: int) -> None:
        """The task has done every position up to this one."""
        with self._moved:
            self._progress[task] = position + 1
            while self._unfinished < len(self._progress) and self._progress[self._unfinished] > EVERYTHING:
                self._unfinished += 1
            self._moved.notify_all()

    def wait(self, task: int, position: int, job: Job, *, every_head: bool = False) -> None:
        """Return when all earlier tasks have done this position."""
        while not self._clear(task, position, every_head):
            with self._moved:
                if not self._clear(task, position, every_head):
                    self._moved.wait(_PATIENCE)
            job.check()

    def _clear(self, task: int, position: int, every_head: bool) -> bool:
        for earlier in range(self._unfinished, task):
            same = every_head or self._heads[earlier] == self._heads[task]
            if same and self._progress[earlier] <= position:
                return False
        return True
