"""Blocks that the host's transport carries: through pinned memory of the host, or from the GPU's as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import cupyx
import numpy as np
from cupy.cuda import runtime

from ringcore import Blocks, Move, Spec, Transport
from ringcore_cupy.device_blocks import size_of
from ringcore_cupy.streams import Side

Sends = Sequence[tuple[Move, Blocks]]
Receives = Sequence[tuple[Move, Sequence[Spec]]]


@dataclass(frozen=True)
class PinnedBytes(Spec):
    """Bytes of the host, which is to receive them where the GPU can copy them from beside its other work."""

    def empty(self) -> Any:
        """New memory that the system does not move."""
        return _memory(self.shape[0])


class Staging:
    """Blocks through pinned memory of the host, of any dtype as bytes.

    The host waits for what leaves to be there, which the caller's stream must come to first.
    """

    explain = "copies through the host's pinned memory"

    def __init__(self, host: Transport) -> None:
        self._host = host
        self._leaving = Side()
        self._landing: list[tuple[Any, Any]] = []  # events, and the memory that is read until then
        self.messages_sent = self.bytes_sent = 0

    def exchange(self, kind: str, sends: Sends, receives: Receives) -> Landing:
        """Start all sends and receives."""
        laid = [(move, tuple(cupy.ascontiguousarray(x) for x in blocks)) for move, blocks in sends]
        staged: list[tuple[Move, Blocks]] = []
        if laid:
            with self._leaving.behind_caller() as stream:
                staged = [(move, tuple(_on_host(x, stream) for x in blocks)) for move, blocks in laid]
            self._leaving.mark().synchronize()
        _count(self, laid)
        expected = [(move, tuple(_pinned(size_of(spec)) for spec in specs)) for move, specs in receives]
        return Landing(self, self._host.exchange(kind, staged, expected), dict(receives))

    def keep(self, event: Any, memory: Any) -> None:
        """Hold memory until the event: CuPy would give it out again at once, whatever still reads it."""
        self._landing = [item for item in self._landing if not item[0].done]
        self._landing.append((event, memory))

    def retire(self) -> None:
        """Nothing: what was sent has left."""

    def abort(self) -> None:
        """Nothing: the host's transport ends what is under way."""

    def close(self) -> None:
        """Give the memory of the host back, and all else that CuPy's pool of pinned memory keeps unused."""
        while self._landing:
            self._landing.pop()[0].synchronize()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


class Landing:
    """Blocks on their way through the host; a `ringcore.Pending`."""

    def __init__(self, staging: Staging, pending: Any, specs: Mapping[Move, Sequence[Spec]]) -> None:
        self._staging, self._pending, self._specs = staging, pending, specs

    def wait(self) -> Mapping[Move, Blocks]:
        """What arrived, once the host has it, for work that the caller's stream is given from now on."""
        came = self._pending.wait()
        stream = cupy.cuda.get_current_stream()
        arrived = {
            move: tuple(_on_device(x, spec, stream) for x, spec in zip(came[move], specs, strict=True))
            for move, specs in self._specs.items()
        }
        if arrived:
            self._staging.keep(stream.record(cupy.cuda.Event(disable_timing=True)), came)
        return arrived


class DeviceMessages:
    """Blocks that a transport takes from the GPU's memory, such as one over a CUDA-aware MPI.

    It knows nothing of streams: the host waits for the caller's stream before it gives memory away, to be read or
    written.
    """

    explain = "messages of the host's transport, from the GPU's memory"

    def __init__(self, host: Transport) -> None:
        self._host = host
        self.messages_sent = self.bytes_sent = 0

    def exchange(self, kind: str, sends: Sends, receives: Receives) -> Any:
        """Start all sends and receives."""
        laid = [(move, tuple(cupy.ascontiguousarray(x) for x in blocks)) for move, blocks in sends]
        _count(self, laid)
        if sends or receives:
            cupy.cuda.get_current_stream().synchronize()
        return self._host.exchange(kind, laid, receives)

    def retire(self) -> None:
        """Nothing: what was sent has left."""

    def abort(self) -> None:
        """Nothing: the host's transport ends what is under way."""

    def close(self) -> None:
        """Nothing is held."""


def _on_host(x: Any, stream: Any) -> Any:
    memory = _memory(x.nbytes)
    if x.nbytes:
        runtime.memcpyAsync(memory.ctypes.data, x.data.ptr, x.nbytes, runtime.memcpyDefault, stream.ptr)
    return memory


def _on_device(memory: Any, spec: Spec, stream: Any) -> Any:
    x = cupy.empty(spec.shape, spec.dtype)
    if x.nbytes:
        runtime.memcpyAsync(x.data.ptr, memory.ctypes.data, x.nbytes, runtime.memcpyDefault, stream.ptr)
    return x


def _memory(size: int) -> Any:
    return cupyx.empty_pinned((max(1, size),), np.uint8)[:size]  # there is no page of 0 bytes


def _pinned(size: int) -> PinnedBytes:
    return PinnedBytes((size,), np.empty(0, np.uint8), np.dtype(np.uint8))


def _count(carrier: Staging | DeviceMessages, sends: Sends) -> None:
    for _, blocks in sends:
        carrier.messages_sent += len(blocks)
        carrier.bytes_sent += sum(x.nbytes for x in blocks)
