"""Failures that are told once: their exit status, their words, and how the ranks of a ring agree on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from ringcore.errors import FileError, PeerError, RingcoreError, RingTimeout, TransportError
from ringcore.protocols import Transport

Value = TypeVar("Value")


class Failure(RingcoreError):  # says what happened; which error it was, its cause says
    """A failure with its exit status; once it leaves `together`, every rank knows of it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int:
    """2 if the caller can put it right by another call, 1 if it failed while running."""
    if isinstance(error, Failure):
        return error.status
    if isinstance(error, FileError):
        return 2
    return (
        1 if isinstance(error, (PeerError, RingTimeout, TransportError)) or not isinstance(error, RingcoreError) else 2
    )


def expected(error: BaseException) -> bool:
    """Whether the message says all, so that no traceback is due."""
    return isinstance(error, (RingcoreError, OSError, MemoryError))


def describe(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, RingcoreError):
        return str(error)
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return f"there is not enough memory for this rank's shard{detail}. Use more ranks, or a narrower --dtype."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return f"{type(error).__name__}: {error}"


def together(transport: Transport | None, step: Callable[[], tuple[Value, Any]]) -> tuple[Value, list[Any]]:
    """Run ``step`` on every rank; its value here, and every rank's note.

    ``step`` returns its value and a note that JSON can hold. If it fails on any rank, every rank raises Failure with
    the first failing rank's message and status; an unexpected error is raised as it is where it occurred.
    """
    if transport is None:
        value, note = step()
        return value, [note]
    failure: Exception | None = None
    try:
        value, note = step()
        answer = {"note": note}
    except Exception as error:  # the other ranks must hear of it before this one leaves
        failure, answer = error, {"error": describe(error), "status": status_of(error)}
    answers = [json.loads(other) for other in transport.gather(json.dumps(answer).encode())]
    if failure is not None and not expected(failure):
        raise failure
    for rank, other in enumerate(answers):
        if "error" in other:
            everywhere = all(answer.get("error") == other["error"] for answer in answers)
            where = "" if everywhere or rank == 0 else f"rank {rank}: "
            raise Failure(where + other["error"], other["status"]) from failure
    return value, [other["note"] for other in answers]


def all_do(transport: Transport | None, action: Callable[[], None]) -> None:
    """Run ``action`` on every rank; if it fails on one, it fails on all, as in `together`."""

    def step() -> tuple[None, None]:
        action()
        return None, None

    together(transport, step)
