"""The torch.distributed transport: one rank's end of a ring."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ringcore import Blocks, Move, Pending, Spec
from ringcore_torch.circle import Circle
from ringcore_torch.groups import checked_group, next_name
from ringcore_torch.messages import GlooMessages

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
        self._circle = Circle(group, next_name(group), timeout)
        self._messages = GlooMessages(self._circle)
        self.rank, self.size = self._circle.rank, self._circle.size
        place = f"machine {platform.node()}" if node is None else f"node {node}"
        places = self._circle.gather(place.encode())
        self.node = places.index(place.encode())
        self.sharers = places.count(place.encode())

    @property
    def explain(self) -> str:
        """How blocks travel."""
        return f"torch.distributed, rank {self.rank} of {self.size}; {self._messages.explain}"

    @property
    def messages_sent(self) -> int:
        """How many tensors of blocks have left this rank."""
        return self._messages.messages_sent

    @property
    def bytes_sent(self) -> int:
        """How many bytes of blocks have left this rank."""
        return self._messages.bytes_sent

    def check(self, *arrays: Any) -> None:
        """Raise UnsupportedError unless all are tensors in host memory."""
        self._messages.check(*arrays)

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
