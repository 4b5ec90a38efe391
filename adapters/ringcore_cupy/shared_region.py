"""A region of every rank's GPU, as large as the ranks need: made, grown and freed together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import cupy
from cupy.cuda import runtime

from ringcore import RingTimeout, Transport
from ringcore_cupy.notes import gathered, patience
from ringcore_cupy.region import Region
from ringcore_cupy.streams import done_within

_LAST = 5.0  # seconds that a rank whose call failed waits for its own streams


class SharedRegion:
    """This rank's region, equal in size to those of all others.

    peers: the ranks that this one reaches. streams: those that work in it, beside the caller's.
    """

    def __init__(self, host: Transport, peers: frozenset[int], streams: Sequence[Any]) -> None:
        self._host, self._peers, self._streams = host, peers, streams
        self._size = 0  # bytes of every rank's region
        self._failed = math.inf  # bytes that a rank could not have
        self.region: Region | None = None
        self.lacking = ""

    def grown(self, size: int) -> bool:
        """Every rank's region has that many bytes; False, on every rank, if one cannot have it. Collective.

        What one could not have is not tried again, which every call would wait for.
        """
        if size <= self._size:
            return True
        if size >= self._failed:
            return False
        # One that had to grow will have to grow again: with some room to spare, that is seldom.
        size = max(size, self._size * 5 // 4)
        self.freed()
        note: dict[str, Any] = {"lacks": ""}
        try:
            if self._peers:
                self.region = Region(size)
                note |= self.region.note()
        except runtime.CUDARuntimeError as error:
            note["lacks"] = f"rank {self._host.rank} cannot share {size} bytes: {error}"
        notes = gathered(self._host, note)
        lacking = [str(note["lacks"]) for note in notes if note["lacks"]]
        if not lacking:
            lacking = [error for error in gathered(self._host, self._opened(notes)) if error]
        self.lacking = "; ".join(lacking)
        if lacking:
            self._failed = size
            self.freed()
            return False
        self._size = size
        return True

    def freed(self) -> None:
        """Close what is open, then free: CUDA wants memory to be closed wherever it was opened before. Collective.

        Raises RingTimeout if this rank's streams do not end; what they may still use is left then.
        """
        region, self.region, self._size = self.region, None, 0
        if region is not None:
            if not self._idle(patience(self._host)):
                region.leave()
                raise RingTimeout(
                    f"rank {self._host.rank} waited {patience(self._host):g} s for its GPU to come to the end of what "
                    "it was given: a peer that the GPU waits for may be stuck or gone. Make another ring."
                )
            region.let_go()
        self._host.gather(b"closed")
        if region is not None:
            region.close()

    def abort(self) -> None:
        """Close what this rank opened, or leave all if its streams may wait for a peer that never comes."""
        if self.region is None:
            return
        if self._idle(_LAST):
            with suppress(runtime.CUDARuntimeError):  # after an error of the GPU's own everything fails
                self.region.let_go()
        else:
            region, self.region = self.region, None
            region.leave()

    def _idle(self, seconds: float) -> bool:
        return done_within(seconds, cupy.cuda.get_current_stream(), *self._streams)

    def _opened(self, notes: Sequence[Mapping[str, Any]]) -> str:
        """Open the peers' memory; what is wrong, if anything."""
        for peer in self._peers:
            try:
                if self.region is not None:
                    self.region.open(peer, notes[peer])
            except runtime.CUDARuntimeError as error:
                return f"rank {self._host.rank} cannot open the memory of rank {peer}: {error}"
        return ""
