"""Blocks on GPUs of one machine, which read and write each other's memory by their copy engines.

Everything is ordered on streams, nothing waits on the host: the work of a whole call can be captured in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory

from ringcore import Blocks, Move, Spec, TransportError, places_at_home
from ringcore_torch.circle import Circle
from ringcore_torch.peer_shares import PeerShares
from ringcore_torch.rendezvous import Meeting

# Signals of a pair of ranks, by what they say.
_READY, _HOP, _HOME, _TAKEN = 0, 1, 2, 3  # and _TAKEN + 1: one for each of two slots
_ALIGNED = 256  # bytes between the starts of tensors
_KEPT = 64  # tensors in a region that are remembered: to make one takes the host as long as to launch a kernel

Tensor = torch.Tensor


class Region:
    """As much memory on every rank, in which every rank reads and writes.

    Blocks lie there as [B, S, H, D], whatever order they come in: so fused kernels like them, and rows are one piece.
    """

    def __init__(self, group: Any, size: int, device: torch.device) -> None:
        self.size = size
        self.memory: Any = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        self.handle: Any = symmetric_memory.rendezvous(self.memory, group)
        self._known: dict[Any, tuple[Tensor, ...]] = {}

    def blocks(self, rank: int, specs: Sequence[Spec], start: int = 0) -> tuple[Tensor, ...]:
        """Tensors like ``specs`` in the memory of ``rank``, from the byte ``start`` on."""
        key = rank, start, *((spec.shape, spec.dtype) for spec in specs)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            found = self._known[key] = tuple(self._made(rank, specs, start))
        return found

    def _made(self, rank: int, specs: Sequence[Spec], start: int) -> Iterator[Tensor]:
        for spec in specs:
            batch, heads, rows, width = spec.shape
            x = self.handle.get_buffer(rank, (batch, rows, heads, width), spec.dtype, start // spec.dtype.itemsize)
            yield x.transpose(1, 2)
            start += _room([spec])


class PeerMemory:
    """One rank's published blocks, and its accumulators on their way.

    A rank copies its visiting block into memory that all can read; each pulls what it needs beside its tiles.
    Accumulators are pushed: to the next rank, which has two slots for them in turn, or home, where each peer has its
    place.
    """

    explain = "peer memory: the GPUs' copy engines pull blocks and push gradients"
    in_place = True

    def __init__(self, circle: Circle, device: torch.device) -> None:
        self._circle, self._device = circle, device
        self._meeting = Meeting(circle.store, circle.rank, circle.size)
        self.shares = PeerShares(circle, self._meeting, device)
        self._index: Any = device.index  # Torch is slow to find the number of a device
        self._deadline = math.ceil(circle.timeout * 1000)
        self._pulling: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._pushing: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._visiting: Region | None = None
        self._carried: Region | None = None
        self._used: set[Any] = set()
        self._outgrown: list[Region] = []
        self._specs: Mapping[int, Sequence[Spec]] = {}
        # Bytes: where accumulators lie that (owner, peer) has carried home, and those of hops, and how many a slot has.
        self._homes: dict[tuple[int, int], int] = {}
        self._hops = self._slot = 0
        self._sent = self._received = 0
        self._taken: tuple[int, int] | None = None  # who is to hear that which slot is free again
        self._next: int | None = None
        self.messages_sent = self.bytes_sent = 0

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]],
    ) -> None:
        """Make ``blocks`` readable; ``specs`` says what each rank publishes, ``carried`` what comes home to it."""
        self._specs = specs
        self._visiting = self._grown(self._visiting, max(map(_room, specs.values())))
        self._homes, self._hops, self._slot = places_at_home(carried, _room)
        if self._slot:
            slots = 0 if self._circle.size == 2 else 2  # between two ranks all go home
            self._carried = self._grown(self._carried, self._hops + slots * self._slot)
        with self._beside(self._pulling):
            # Every rank is done with what was published, and with what came home, before.
            self._visiting.handle.barrier(_READY, self._deadline)
            for mine, x in zip(self._visiting.blocks(self._circle.rank, specs[self._circle.rank]), blocks, strict=True):
                _copy(mine, x)
            copied = self._pulling.record_event()
            self._visiting.handle.barrier(_READY, self._deadline)
        if torch.cuda.is_current_stream_capturing():
            # In a graph no stream goes first: beside a tile, which fills the GPU, these copies would wait for its end.
            torch.cuda.current_stream(self._index).wait_event(copied)

    def fetch(self, owner: int, rows: slice | None, seen: slice | None) -> Blocks:
        """Begin to pull what ``owner`` published; it has arrived once the exchange that follows was waited for."""
        if self._visiting is None:
            raise LookupError("nothing is published")
        theirs = self._visiting.blocks(owner, self._specs[owner])
        theirs = theirs if rows is None else tuple(x[:, :, rows] for x in theirs)
        pulled = tuple(_empty_like(x) for x in theirs)
        wanted = slice(None) if seen is None else seen
        with self._beside(self._pulling):
            for mine, x in zip(pulled, theirs, strict=True):
                _copy(mine[:, :, wanted], x[:, :, wanted])
        return pulled

    def _arrival(self) -> Streamed:
        """What was fetched so far."""
        return Streamed(self._index, self._pulling.record_event(), {}, ())

    def exchange(
        self, kind: str, sends: Sequence[tuple[Move, Blocks]], receives: Sequence[tuple[Move, Sequence[Spec]]]
    ) -> Streamed | Home:
        """Begin to push accumulators, or to wait for them; of visiting blocks, wait for those that were fetched."""
        if kind == "visiting":
            return self._arrival()
        if self._carried is None:
            raise LookupError("no memory for accumulators")
        self._tell_taken()
        for move, _ in receives:
            if move.block == self._circle.rank:
                ((move, specs),) = receives
                return Home(self, move, specs)
        arriving = {}
        with self._beside(self._pushing):
            for move, specs in receives:
                self._carried.handle.wait_signal(move.peer, _HOP, self._deadline)
                slot, self._received = self._received % 2, self._received + 1
                arriving[move] = self._carried.blocks(self._circle.rank, specs, self._hops + slot * self._slot)
                self._taken = move.peer, slot
            for move, blocks in sends:
                self._push(self._carried, move, blocks)
        return Streamed(self._index, self._pushing.record_event(), arriving, tuple(blocks for _, blocks in sends))

    def abort(self) -> None:
        """Nothing: what waits for a peer's signal has a deadline of its own."""

    def retire(self) -> None:
        """Nothing published is read after this."""
        self._tell_taken()
        if self._carried is not None and self._next is not None:
            with self._beside(self._pushing):
                for slot in range(min(2, self._sent)):
                    self._carried.handle.wait_signal(self._next, _TAKEN + (self._sent - 1 - slot) % 2, self._deadline)
        self._sent = self._received = 0
        self._next = None
        for used in self._used:  # no other: a graph must not depend on a stream that is not in it
            torch.cuda.current_stream(self._index).wait_stream(used)
        self._used.clear()

    def home(self, move: Move, specs: Sequence[Spec]) -> Blocks:
        """What came home, once it has come, in memory that the next call overwrites."""
        if self._carried is None:
            raise LookupError("no memory for accumulators")
        self._carried.handle.wait_signal(move.peer, _HOME, self._deadline)
        rank = self._circle.rank
        return self._carried.blocks(rank, specs, self._homes[rank, move.peer])

    def _push(self, region: Region, move: Move, blocks: Blocks) -> None:
        self.messages_sent += len(blocks)
        self.bytes_sent += sum(x.nbytes for x in blocks)
        specs = [Spec(tuple(x.shape), x, x.dtype) for x in blocks]
        if move.block == move.peer:
            start, signal = self._homes[move.peer, self._circle.rank], _HOME
        else:
            if self._next not in (None, move.peer):
                raise TransportError(f"accumulators go from rank {self._circle.rank} to {self._next} and {move.peer}.")
            slot, self._next = self._sent % 2, move.peer
            if self._sent >= 2:
                region.handle.wait_signal(move.peer, _TAKEN + slot, self._deadline)
            self._sent += 1
            start, signal = self._hops + slot * self._slot, _HOP
        for theirs, x in zip(region.blocks(move.peer, specs, start), blocks, strict=True):
            _copy(theirs, x)
        region.handle.put_signal(move.peer, signal, self._deadline)

    def _tell_taken(self) -> None:
        """On the caller's stream: what arrived last was read by what came before."""
        if self._taken is not None and self._carried is not None:
            peer, slot = self._taken
            self._carried.handle.put_signal(peer, _TAKEN + slot, self._deadline)
            self._taken = None

    def _grown(self, region: Region | None, size: int) -> Region:
        if region is not None and region.size >= size:
            return region
        if region is not None:
            self._outgrown.append(region)  # a peer may be reading there, a captured graph may do so again
            size = max(size, region.size * 3 // 2)  # so that all that were outgrown are no more than twice the last
        if torch.cuda.is_current_stream_capturing():
            raise TransportError(
                "a call over GPUs' memory was captured before it ever ran, but making that memory is no work of a "
                "stream. Run the call once, then capture it."
            )
        region = Region(self._meeting.name, size, self._device)
        # Torch clears it on the default stream: a signal that comes before would be wiped out.
        torch.cuda.default_stream(self._device).synchronize()
        self._circle.gather(b"cleared")
        return region

    @contextmanager
    def _beside(self, stream: Any) -> Iterator[None]:
        """On ``stream``, after all that the caller's stream was given so far."""
        stream.wait_stream(torch.cuda.current_stream(self._index))
        self._used.add(stream)
        with torch.cuda.stream(stream):
            yield


class Streamed:
    """What a stream moves: the caller's stream goes on after it, the host does not wait."""

    def __init__(self, index: Any, event: Any, arriving: Mapping[Move, Blocks], leaving: Sequence[Blocks]) -> None:
        self._index, self._event, self._arriving, self._leaving = index, event, arriving, leaving

    def wait(self) -> Mapping[Move, Blocks]:
        """What arrives, for work that the caller's stream is given from now on."""
        torch.cuda.current_stream(self._index).wait_event(self._event)
        self._leaving = ()
        return self._arriving


class Home:
    """Accumulators that come home at the end: nobody waits for them before."""

    def __init__(self, memory: PeerMemory, move: Move, specs: Sequence[Spec]) -> None:
        self._memory, self._move, self._specs = memory, move, specs

    def wait(self) -> Mapping[Move, Blocks]:
        """What came home, for work that the caller's stream is given from now on."""
        return {self._move: self._memory.home(self._move, self._specs)}


def _empty_like(x: Tensor) -> Tensor:
    """Memory for [B, H, S, D] that lies as [B, S, H, D]."""
    batch, heads, rows, width = x.shape
    return x.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _copy(target: Tensor, x: Tensor) -> None:
    """Both [B, H, S, D]. If rows are left out, each batch entry by itself: a copy engine takes one piece at a time."""
    pairs = [(target, x)] if target.transpose(1, 2).is_contiguous() else zip(target, x, strict=True)
    for mine, theirs in pairs:
        mine.copy_(theirs)


def _room(specs: Sequence[Spec]) -> int:
    """The bytes that tensors like these take, one after the other."""
    sizes = (math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)
