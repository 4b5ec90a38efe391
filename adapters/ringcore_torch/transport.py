"""The torch.distributed transport: one rank's end of a ring."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ringcore import Blocks, Move, Pending, Spec, UnsupportedError
from ringcore_torch.circle import Circle
from ringcore_torch.groups import checked_group, next_name
from ringcore_torch.messages import GlooMessages
from ringcore_torch.peer_memory import PeerMemory, check_reach

_rings: WeakKeyDictionary[Any, TorchTransport] = WeakKeyDictionary()


class TorchTransport:
    """A ring over a process group; implements `ringcore.Transport`.

    group: a ProcessGroup, or a DeviceMesh of one dimension. The ring makes connections of its own among the same
        processes, so that its messages never meet yours. Ranks count within the group.
    node: ranks with equal numbers count as one machine; None takes the machines as they are.
    timeout: seconds that a rank waits for its peers; None takes RINGCORE_TIMEOUT from the environment, or 120.

    Making one is collective. One call at a time: a second thread needs a ring of its own.

    Attributes: rank, size, node, sharers as in `ringcore.Transport`.
    Raises TransportError if there is no ring to be had: no process group, or one that this process is not in.
    """

    def __init__(self, group: Any, *, node: int | None = None, timeout: float | None = None) -> None:
        group = checked_group(group)
        self._name = group.group_name  # not the group: it ends with the last that holds it
        self._circle = Circle(group, next_name(group), timeout)
        self._messages = GlooMessages(self._circle)
        self.rank, self.size = self._circle.rank, self._circle.size
        place = f"machine {platform.node()}" if node is None else f"node {node}"
        places = self._circle.gather(place.encode())
        self.node = places.index(place.encode())
        self.sharers = places.count(place.encode())
        self._peer_memory: PeerMemory | None = None

    @property
    def explain(self) -> str:
        """How blocks travel."""
        carriers = f"{self._messages.explain}; blocks on GPUs: {PeerMemory.explain}"
        return f"torch.distributed, rank {self.rank} of {self.size}; {carriers}"

    @property
    def messages_sent(self) -> int:
        """How many tensors of blocks have left this rank."""
        return self._messages.messages_sent + (self._peer_memory.messages_sent if self._peer_memory else 0)

    @property
    def bytes_sent(self) -> int:
        """How many bytes of blocks have left this rank; those that others read from its memory are not counted."""
        return self._messages.bytes_sent + (self._peer_memory.bytes_sent if self._peer_memory else 0)

    def check(self, *arrays: Any) -> None:
        """Raise UnsupportedError unless all are tensors that can travel from where they are."""
        if not all(isinstance(x, torch.Tensor) and x.is_cuda for x in arrays):
            self._messages.check(*arrays)
        elif arrays[0].device.index != torch.cuda.current_device():
            raise UnsupportedError(
                f"the tensors are on {arrays[0].device}, but rank {self.rank} works on GPU "
                f"{torch.cuda.current_device()}. Call torch.cuda.set_device({arrays[0].device.index}) first."
            )

    def capturing(self) -> bool:
        """Whether the caller's work is recorded for a graph, not run."""
        initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return initialized and torch.cuda.is_current_stream_capturing()

    def reaches(self, reader: int, owner: int) -> bool:
        """Whether ``reader`` can fetch what ``owner`` published."""
        return reader != owner

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Sequence[Spec]] | None = None,
    ) -> bool:
        """Make this rank's blocks on a GPU readable by all. False for blocks in host memory, which go as messages."""
        if not blocks[0].is_cuda:
            return False
        if self._peer_memory is None:
            check_reach(self._circle, blocks[0].device)
            self._peer_memory = PeerMemory(self._circle, self._name, blocks[0].device)
        self._peer_memory.publish(blocks, specs, carried or {})
        return True

    def fetch(self, owner: int, rows: slice | None, seen: slice | None = None) -> Blocks:
        """What ``owner`` published, there once the exchange that follows was waited for."""
        return self._published.fetch(owner, rows, seen)

    def retire(self) -> None:
        """No rank reads published blocks after this. Collective."""
        self._published.retire()

    @property
    def _published(self) -> PeerMemory:
        if self._peer_memory is None:
            raise LookupError("nothing was published")
        return self._peer_memory

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note, in the order of ranks."""
        return self._circle.gather(note)

    def exchange(
        self,
        kind: str,
        sends: Sequence[tuple[Move, Blocks]],
        receives: Sequence[tuple[Move, Sequence[Spec]]],
    ) -> Pending:
        """Start all sends and receives; blocks stay untouched until the answer's wait returns."""
        like = [x for _, blocks in sends for x in blocks] + [spec.like for _, specs in receives for spec in specs]
        if self._peer_memory is not None and all(x.is_cuda for x in like):
            if kind == "visiting":
                return self._peer_memory.arrival()
            return self._peer_memory.exchange(sends, receives)
        return self._messages.exchange(kind, sends, receives)

    def abort(self, error: BaseException) -> None:
        """Tell every peer that this rank failed; the ring is of no use afterwards."""
        self._circle.abort(error)


def adapt(ring: Any) -> TorchTransport:
    """The ring of this process group or mesh, made at the first call and kept as long as the group.

    The first call is collective. Raises TransportError or KeywordError if no ring can be made of it.
    """
    group = checked_group(ring)
    transport = _rings.get(group)
    if transport is None:
        transport = _rings[group] = TorchTransport(group)
    return transport
