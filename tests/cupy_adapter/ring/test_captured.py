"""Calls while a stream is captured in a graph."""

import cupy
import pytest
from thread_host import ThreadHost, World

from ringcore import UnsupportedError
from ringcore_cupy import CupyTransport


@pytest.mark.parametrize("pointer", [2, 77])
def test_captured_streams_are_refused(monkeypatch, pointer):
    """Also 2, CUDA's name for the stream of each thread."""
    ring = CupyTransport(ThreadHost(World(1), 0))
    monkeypatch.setattr(cupy.cuda.Stream, "is_capturing", lambda stream: True)
    with cupy.cuda.ExternalStream(pointer), pytest.raises(UnsupportedError, match="captured in a graph"):
        ring.check(cupy.zeros(3))


@pytest.mark.parametrize("pointer", [0, 1])
def test_the_null_stream_is_not_asked(monkeypatch, pointer):
    """CUDA answers with an error while any other stream is captured."""
    ring = CupyTransport(ThreadHost(World(1), 0))
    monkeypatch.delattr(cupy.cuda.Stream, "is_capturing")
    with cupy.cuda.ExternalStream(pointer):
        ring.check(cupy.zeros(3))
