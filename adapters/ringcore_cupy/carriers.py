"""What carries a ring's blocks between GPUs: found at its first call, by where the ranks and their GPUs are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

from cupy.cuda import runtime

from ringcore import Blocks, KeywordError, Move, Spec, Transport, UnsupportedError
from ringcore_cupy.connecting import connect
from ringcore_cupy.nccl_messages import NcclMessages
from ringcore_cupy.peer_memory import PeerMemory
from ringcore_cupy.reach import HOST, MPI, NCCL, Ways, find_ways
from ringcore_cupy.staging import DeviceMessages, Staging
from ringcore_cupy.streams import Together

_WORDS = {NCCL: NcclMessages.explain, MPI: DeviceMessages.explain, HOST: Staging.explain}


class Carriers:
    """All of one rank that lasts as long as its ring: memory, events and connections of one GPU.

    host: carries notes, and what no GPU does. asked: the carrier that was asked for, if any.
    """

    def __init__(self, host: Transport, asked: str | None) -> None:
        self._host, self._asked = host, asked
        self.device: int | None = None  # the GPU that they are for, once they are made
        self._ways: Ways | None = None
        self._near: PeerMemory | None = None
        self._far: NcclMessages | DeviceMessages | Staging | None = None
        self._far_name = ""
        self._why: list[str] = []
        self._in_place = False
        self._refusal: Callable[[], BaseException | None] = lambda: None

    @property
    def explain(self) -> str:
        """Which pairs of ranks use what, and why."""
        if self._ways is None:
            asked = "as the first call finds the ranks' GPUs" if self._asked is None else f"by {self._asked!r}"
            return f"blocks on GPUs: {asked}"
        said = []
        pairs = [
            f"{rank}-{peer}" for rank, peers in enumerate(self._ways.near) for peer in sorted(peers) if rank < peer
        ]
        if self._in_place:
            whose = "all ranks" if self._ways.complete else f"the ranks {', '.join(pairs)}"
            said.append(f"{whose} by CUDA IPC: copy engines pull blocks and push gradients")
        if self._far is not None:
            whose = "other blocks" if self._in_place else "all blocks"
            said.append(f"{whose} by {_WORDS[self._far_name]}")
        why = [f" ({reason})" for reason in (self._ways.why, *self._why) if reason]
        return f"blocks on GPUs: {'; '.join(said)}{''.join(why)}"

    @property
    def messages_alone(self) -> bool:
        """Whether a carrier was asked for that only sends messages."""
        return self._asked in _WORDS

    @property
    def messages_sent(self) -> int:
        """How many arrays of blocks have left this rank."""
        return sum(carrier.messages_sent for carrier in (self._near, self._far) if carrier is not None)

    @property
    def bytes_sent(self) -> int:
        """How many bytes of blocks have left this rank."""
        return sum(carrier.bytes_sent for carrier in (self._near, self._far) if carrier is not None)

    def refused(self, error: BaseException) -> bool:
        """Whether that is an error that every rank came to by itself, after which the ring is as good as before."""
        return error is self._refusal()

    @property
    def bytes_published(self) -> int:
        """How many bytes of blocks were made readable for other ranks."""
        return 0 if self._near is None else self._near.bytes_published

    def reaches(self, reader: int, owner: int) -> bool:
        """Whether ``reader`` can fetch what ``owner`` published."""
        return self._in_place and self._ways is not None and owner in self._ways.near[reader]

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]],
    ) -> None:
        """Begin a call. Collective. Raises KeywordError or UnsupportedError, on every rank, if nothing can carry."""
        try:
            self._begin(blocks, specs, carried)
        except (KeywordError, UnsupportedError) as error:
            self._refusal = ref(error)
            raise

    def _begin(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]],
    ) -> None:
        if self._ways is None:
            ways = find_ways(self._host, self._asked)
            if any(ways.near):
                self._near = PeerMemory(self._host, ways.near[self._host.rank])
            self._ways, self.device = ways, runtime.getDevice()
        self._in_place = self._near is not None and self._near.publish(blocks, specs, carried)
        if self._far is None and not (self._in_place and self._ways.complete):
            self._far_name, self._far = self._connected(self._ways)

    def fetch(self, owner: int, rows: slice | None, seen: slice | None) -> Blocks:
        """Begin to pull what ``owner`` published."""
        if self._near is None or not self._in_place:
            raise LookupError("nothing was published")
        return self._near.fetch(owner, rows, seen)

    def exchange(
        self, kind: str, sends: Sequence[tuple[Move, Blocks]], receives: Sequence[tuple[Move, Sequence[Spec]]]
    ) -> Together:
        """Start all sends and receives, each pair of ranks by what it has."""
        parts: list[Any] = []
        homecoming = any(move.block == self._host.rank for move, _ in receives)
        near = self._near if self._in_place else None
        if near is not None:
            near.tell_taken()
            if kind == "visiting":
                parts.append(near.arrival())
            else:
                reached = self._ways.near[self._host.rank] if self._ways is not None else frozenset()
                parts += [near.receive(move, specs) for move, specs in receives if move.peer in reached]
                parts += [near.send(move, blocks) for move, blocks in sends if move.peer in reached]
                sends = [(move, blocks) for move, blocks in sends if move.peer not in reached]
                receives = [(move, specs) for move, specs in receives if move.peer not in reached]
        if self._far is not None:
            # First, and also where it has nothing to do: it may keep what a peer needs before this rank may wait.
            parts.insert(0, self._far.exchange(kind, sends, receives))
            if homecoming and isinstance(self._far, NcclMessages):
                parts.insert(0, Rest(self._far))
        return Together(parts)

    def retire(self) -> None:
        """The end of a call. Collective."""
        if self._far is not None:
            self._far.retire()
        if self._near is not None and self._in_place:
            self._near.retire()

    def abort(self) -> None:
        """End a call that failed."""
        # What NCCL still waits for ends first: the streams that are then waited for may stand behind it.
        for carrier in (self._far, self._near):
            if carrier is not None:
                carrier.abort()

    def close(self) -> None:
        """Free memory and connections. Collective."""
        for carrier in (self._near, self._far):
            if carrier is not None:
                carrier.close()
        self._near = self._far = self._ways = self.device = None
        self._in_place = False

    def _connected(self, ways: Ways) -> tuple[str, NcclMessages | DeviceMessages | Staging]:
        """The best carrier between all ranks that can be made; equal on every rank."""
        why = []
        if self._near is not None and self._near.lacking:
            why.append(f"memory that all can read is lacking: {self._near.lacking}")
        for name in ways.others:
            if name == MPI:
                self._why = why
                return name, DeviceMessages(self._host)
            if name == HOST:
                self._why = why
                return name, Staging(self._host)
            connection, error = connect(self._host)
            if connection is not None:
                self._why = why
                return name, NcclMessages(self._host, connection)
            why.append(f"NCCL failed: {error}")
        raise UnsupportedError(
            f"carrier is {self._asked!r}, but {'; '.join(why)}. Leave the carrier out, and blocks take another way."
        )


class Rest:
    """What NCCL kept until the end of a rank's steps; a `ringcore.Pending`."""

    def __init__(self, messages: NcclMessages) -> None:
        self._messages = messages

    def wait(self) -> Mapping[Move, Blocks]:
        """Nothing arrives."""
        return self._messages.post_rest()
