"""Streams beside the caller's, and arrays that pass between them.

CuPy's pool gives freed memory out again at once, in the order of the stream that was current when the memory was asked
for; it knows of no other stream that may still read or write there. Three rules make that right:

- Arrays that a stream beside the caller's reads or writes are asked for on the caller's stream.
- Such a stream begins behind all that the caller's was given so far (`Side.behind_caller`): whoever had the memory
  before is done with it.
- The caller's stream goes on behind that stream (`Streamed.wait`) before the arrays are let go, which the `Streamed`
  holds until then: whoever has the memory next comes after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cupy

from ringcore import Blocks, Move


def mark(stream: Any) -> Any:
    """An event behind all that ``stream`` was given so far."""
    return stream.record(cupy.cuda.Event(disable_timing=True))


def done_within(seconds: float, *under_way: Any) -> bool:
    """Whether these streams or events are done by then: to wait in CUDA knows no deadline, and no interrupt."""
    until = time.monotonic() + seconds
    while not all(x.done for x in under_way):
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


class Side:
    """A stream of the current device beside the caller's."""

    def __init__(self) -> None:
        # Else the default stream would wait for it; and a tile fills the GPU, behind which its copies would wait.
        self.stream: Any = cupy.cuda.Stream(non_blocking=True, priority=-1)

    @contextmanager
    def behind_caller(self) -> Iterator[Any]:
        """On this stream, behind all that the caller's was given so far."""
        self.stream.wait_event(mark(cupy.cuda.get_current_stream()))
        with self.stream:
            yield self.stream

    def mark(self) -> Any:
        """An event behind all that this stream was given so far."""
        return mark(self.stream)

    def before_caller(self) -> None:
        """What the caller's stream is given from now on begins behind all that this one was given."""
        cupy.cuda.get_current_stream().wait_event(self.mark())


class Streamed:
    """What a stream moves: the caller's stream goes on behind it, the host does not wait. A `ringcore.Pending`."""

    def __init__(self, event: Any, leaving: Sequence[Blocks] = ()) -> None:
        self._event, self._leaving = event, leaving

    def wait(self) -> Mapping[Move, Blocks]:
        """Nothing arrives; what was moved is there for work that the caller's stream is given from now on."""
        cupy.cuda.get_current_stream().wait_event(self._event)
        self._leaving = ()
        return {}


class Together:
    """Several exchanges that are waited for as one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts

    def wait(self) -> Mapping[Move, Blocks]:
        """What arrived in any of them."""
        arrived: dict[Move, Blocks] = {}
        for part in self._parts:
            arrived |= part.wait()
        return arrived
