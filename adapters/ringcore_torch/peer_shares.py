"""One small tensor of each rank, read by all ranks from each other's memory: on the caller's stream, in three launches.

For what is too small to move beside anything else, such as the partials of one query.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory

from ringcore import TransportError
from ringcore_torch.circle import Circle
from ringcore_torch.rendezvous import Meeting

_CHANNEL = 0
_LEAST = 1 << 16  # bytes of a slot
_KEPT = 64  # shapes

Tensor = torch.Tensor


class PeerShares:
    """Two slots of each rank in turn: none writes to one before all have read it, for they met over the other since."""

    def __init__(self, circle: Circle, meeting: Meeting, device: torch.device) -> None:
        self._circle, self._meeting, self._device = circle, meeting, device
        self._deadline = math.ceil(circle.timeout * 1000)
        self._room = self._count = 0
        self._handle: Any = None
        self._outgrown: list[Any] = []  # a peer may be reading there
        self._read: Any = None
        self._known: dict[Any, list[Tensor]] = {}

    def of_all(self, x: Tensor) -> Tensor:
        """Copies of all ranks' tensors, which are like x, stacked in the order of ranks. Collective."""
        if self._handle is None or x.nbytes > self._room:
            self._grow(x.nbytes)
        stream, capturing = torch.cuda.current_stream(self._device), torch.cuda.is_current_stream_capturing()
        if self._read is not None and not capturing:
            stream.wait_event(self._read)  # the last call may have been on another stream
        # What a graph replays again and again has a slot of its own, and meets before it writes there.
        slots = self._slots(2 if capturing else self._count % 2, tuple(x.shape), x.dtype)
        if capturing:
            self._handle.barrier(_CHANNEL, self._deadline)
        else:
            self._count += 1
        slots[self._circle.rank].copy_(x)
        self._handle.barrier(_CHANNEL, self._deadline)
        found = torch.stack(slots)
        if not capturing:
            self._read = stream.record_event()
        return found

    def _slots(self, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """All ranks' slots of this turn as such tensors: kept, for to make one takes the host long."""
        key = turn, shape, dtype
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            start = turn * self._room // dtype.itemsize
            ranks = range(self._circle.size)
            found = self._known[key] = [self._handle.get_buffer(rank, shape, dtype, start) for rank in ranks]
        return found

    def _grow(self, least: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise TransportError(
                "a call over GPUs' memory was captured before it ever ran, but making that memory is no work of a "
                "stream. Run the call once, then capture it."
            )
        if self._handle is not None:
            self._outgrown.append((self._memory, self._handle))
            self._known.clear()
        self._room = max(_LEAST, 1 << (least - 1).bit_length())
        self._memory: Any = symmetric_memory.empty(3 * self._room, dtype=torch.uint8, device=self._device)
        self._handle = symmetric_memory.rendezvous(self._memory, self._meeting.name)
        # Torch clears it on the default stream: a signal that comes before would be wiped out.
        torch.cuda.default_stream(self._device).synchronize()
        self._circle.gather(b"cleared")
