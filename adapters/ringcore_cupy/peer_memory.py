"""Blocks on GPUs of one machine, which copy to and from each other's memory by CUDA's handles between processes.

A rank copies its visiting block into memory that its peers can read; each pulls what it needs beside its tiles.
Accumulators are pushed: to the next rank, which has two slots for them in turn, or home, where there is one.

Streams wait for events of other processes, the host for none of them. But CUDA takes an event as it was last recorded,
so the host must know of the record before it makes a stream wait: where all ranks publish and retire that is a
`gather` of the host's transport, for accumulators a message of one byte, a token. With it come its deadline and the
news of a failed peer; and as a stream only ever waits for what was recorded before, no streams wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from ringcore import Blocks, Move, Spec, Transport, TransportError, places_at_home
from ringcore_cupy.device_blocks import (
    copy_rows,
    empty_rows_first,
    lies_rows_first,
    room,
    rows_first,
    size_of,
    starts,
)
from ringcore_cupy.region import Region
from ringcore_cupy.shared_region import SharedRegion
from ringcore_cupy.streams import Side, Streamed

_TOKEN = Spec((1,), np.empty(0, np.uint8), np.dtype(np.uint8))


class PeerMemory:
    """One rank's published blocks, and accumulators on their way, among ranks that reach each other's memory.

    peers: the ranks that this one reaches. host: carries notes and tokens.
    """

    def __init__(self, host: Transport, peers: frozenset[int]) -> None:
        self._host = host
        self._pulling, self._pushing = Side(), Side()
        self._shared = SharedRegion(host, peers, (self._pulling.stream, self._pushing.stream))
        self._specs: Mapping[int, Sequence[Spec]] = {}
        self._ready: set[int] = set()  # whose blocks the pulling stream has waited for
        # Bytes: where accumulators lie that (owner, peer) has carried home, and those of hops, and how many a slot has.
        self._homes: dict[tuple[int, int], int] = {}
        self._hops = self._slot = 0
        self._sent = self._received = 0
        self._next: int | None = None
        self._taken: tuple[int, int, int] | None = None  # of whose block which peer is to hear that which slot is free
        self._told: list[Any] = []  # tokens that left
        self._expected: list[Any] = []  # tokens of slots that are free again
        self.messages_sent = self.bytes_sent = self.bytes_published = 0

    @property
    def lacking(self) -> str:
        """Why a rank has no memory to publish in, if so."""
        return self._shared.lacking

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]],
    ) -> bool:
        """Make ``blocks`` readable for the peers; False, on every rank, if one has no memory for it. Collective."""
        start = max(map(room, specs.values()))
        self._homes, self._hops, self._slot = places_at_home(carried, room, start)
        slots = 0 if self._host.size == 2 else 2  # between two ranks all go home
        if not self._shared.grown(self._hops + slots * self._slot):
            return False
        self._specs = specs
        self._ready.clear()
        region = self._shared.region
        if region is not None:
            with self._pulling.behind_caller() as stream:
                for mine, x in zip(_arrays(region, 0, specs[self._host.rank], first=True), blocks, strict=True):
                    mine[...] = x
                region.record("ready", stream)
                self.bytes_published += sum(map(size_of, specs[self._host.rank]))
                self._pushing.stream.wait_event(self._pulling.mark())
        self._host.gather(b"published")
        return True

    def fetch(self, owner: int, rows: slice | None, seen: slice | None) -> Blocks:
        """Begin to pull what ``owner`` published; it is there once `arrival` was waited for."""
        region, specs = self._made(), self._specs[owner]
        wanted = range(specs[0].shape[2])[slice(None) if rows is None else rows]
        places = range(len(wanted))[slice(None) if seen is None else seen]
        shapes = ((*spec.shape[:2], len(wanted), spec.shape[3]) for spec in specs)
        pulled = tuple(empty_rows_first(shape, spec.dtype) for shape, spec in zip(shapes, specs, strict=True))
        with self._pulling.behind_caller() as stream:
            if owner not in self._ready:
                region.wait(owner, "ready", stream)
                self._ready.add(owner)
            for x, spec, start in zip(pulled, specs, starts(specs), strict=False):
                source = region.address(owner) + start
                copy_rows(
                    x.data.ptr, source, spec, wanted[places.start : places.stop : places.step], len(wanted), places,
                    stream,
                )  # fmt: skip
        return pulled

    def arrival(self) -> Streamed:
        """What was fetched so far."""
        return Streamed(self._pulling.mark())

    def send(self, move: Move, blocks: Blocks) -> Sent:
        """Begin to push accumulators into the memory of ``move.peer``."""
        region, at_home = self._made(), move.block == move.peer
        self.messages_sent += len(blocks)
        self.bytes_sent += sum(x.nbytes for x in blocks)
        number = self._sent
        if not at_home:
            if self._next not in (None, move.peer):
                raise TransportError(f"accumulators go from rank {self._host.rank} to {self._next} and {move.peer}.")
            self._next, self._sent = move.peer, number + 1
            if number >= 2:
                self._await_slot()
        flags = sum(1 << place for place, x in enumerate(blocks) if lies_rows_first(x))
        laid = tuple(x if lies_rows_first(x) else cupy.ascontiguousarray(x) for x in blocks)
        with self._pushing.behind_caller() as stream:
            if not at_home and number >= 2:
                region.wait(move.peer, f"taken {number % 2}", stream)
            place = self._homes[move.peer, self._host.rank] if at_home else self._hop(number)
            target = region.address(move.peer) + place
            specs = [Spec(tuple(x.shape), x, x.dtype) for x in laid]
            for x, start in zip(laid, starts(specs), strict=False):
                if x.nbytes:
                    runtime.memcpyAsync(target + start, x.data.ptr, x.nbytes, runtime.memcpyDefault, stream.ptr)
            region.record("home" if at_home else f"hop {number % 2}", stream)
        token = self._tell(move, flags)
        if not at_home:
            self._expected.append(self._listen(move))
        return Sent(self._pushing.mark(), laid, token)

    def receive(self, move: Move, specs: Sequence[Spec]) -> Arriving:
        """Expect accumulators from ``move.peer``, which lie in this rank's memory until the next exchange."""
        if move.block == self._host.rank:
            return Arriving(self, move, specs, None)
        number, self._received = self._received, self._received + 1
        return Arriving(self, move, specs, number)

    def tell_taken(self) -> None:
        """What arrived last was read by what the caller's stream was given so far."""
        if self._taken is not None:
            peer, block, slot = self._taken
            self._made().record(f"taken {slot}", cupy.cuda.get_current_stream())
            self._told.append(self._tell(Move(peer, block), 0))
            self._taken = None

    def retire(self) -> None:
        """Nothing that was published or sent in this call is read after this. Collective."""
        self.tell_taken()
        for token in (*self._expected, *self._told):
            token.wait()
        self._forget()
        region = self._shared.region
        if region is not None:
            for side in (self._pulling, self._pushing):
                side.before_caller()
            region.record("done", cupy.cuda.get_current_stream())
        self._host.gather(b"retired")
        if region is not None:  # the next call overwrites what peers have read of this one, and what they were sent
            region.await_peers(self._pulling.stream)

    def abort(self) -> None:
        """End a call that failed: close what this rank opened; what its peers opened lasts as long as the ring."""
        self._forget()
        self._shared.abort()

    def close(self) -> None:
        """Free everything. Collective. Raises RingTimeout if this rank's streams do not end."""
        self._shared.freed()

    def landed(self, move: Move, specs: Sequence[Spec], number: int | None, flags: int) -> Blocks:
        """What was pushed here, for work that the caller's stream is given from now on."""
        region = self._made()
        event = "home" if number is None else f"hop {number % 2}"
        region.wait(move.peer, event, cupy.cuda.get_current_stream())
        if number is not None:
            self._taken = move.peer, move.block, number % 2
        begin = self._homes[self._host.rank, move.peer] if number is None else self._hop(number)
        found: list[Any] = []
        for place, (spec, start) in enumerate(zip(specs, starts(specs), strict=False)):
            found += _arrays(region, begin + start, [spec], first=bool(flags >> place & 1))
        return tuple(found)

    def expect(self, move: Move) -> Any:
        """The token of accumulators that come."""
        return self._listen(move)

    def _hop(self, number: int) -> int:
        """Where the accumulators of a hop lie in a region."""
        return self._hops + number % 2 * self._slot

    def _await_slot(self) -> None:
        """Hear that the peer has recorded that the slot used two hops ago is free."""
        self._expected.pop(0).wait()

    def _tell(self, move: Move, flags: int) -> Any:
        token = np.array([flags], np.uint8)
        return self._host.exchange("carried", [(Move(move.peer, move.block), (token,))], [])

    def _listen(self, move: Move) -> Any:
        return self._host.exchange("carried", [], [(Move(move.peer, move.block), (_TOKEN,))])

    def _forget(self) -> None:
        self._told, self._expected, self._taken, self._next = [], [], None, None
        self._sent = self._received = 0

    def _made(self) -> Region:
        if self._shared.region is None:
            raise LookupError("nothing was published")
        return self._shared.region


class Sent:
    """Accumulators that are pushed; a `ringcore.Pending`."""

    def __init__(self, event: Any, leaving: Blocks, token: Any) -> None:
        self._streamed, self._token = Streamed(event, (leaving,)), token

    def wait(self) -> Mapping[Move, Blocks]:
        """Nothing arrives; what was sent may be overwritten by work that the caller's stream is given from now on."""
        self._token.wait()
        return self._streamed.wait()


class Arriving:
    """Accumulators that a peer pushes here; a `ringcore.Pending`."""

    def __init__(self, memory: PeerMemory, move: Move, specs: Sequence[Spec], number: int | None) -> None:
        self._memory, self._move, self._specs, self._number = memory, move, specs, number
        self._token = memory.expect(move)

    def wait(self) -> Mapping[Move, Blocks]:
        """What was pushed, in memory that the exchange after the next one of its kind, or the next call, overwrites."""
        (token,) = next(iter(self._token.wait().values()))
        return {self._move: self._memory.landed(self._move, self._specs, self._number, int(token[0]))}


def _arrays(region: Region, start: int, specs: Sequence[Spec], *, first: bool) -> Iterator[Any]:
    """The arrays in this rank's own memory, from the byte ``start`` on, each as [B, H, S, D]."""
    for spec, place in zip(specs, starts(specs), strict=False):
        if not size_of(spec):
            yield cupy.empty(spec.shape, spec.dtype)
        elif first:
            pointer = region.own + (start + place)
            yield cupy.ndarray(rows_first(spec.shape), spec.dtype, pointer).transpose(0, 2, 1, 3)
        else:
            yield cupy.ndarray(spec.shape, spec.dtype, region.own + (start + place))
