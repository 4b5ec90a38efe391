"""The torch.distributed transport: one rank's end of a ring."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ringcore import Blocks, Grid, Move, Pending, RingcoreError, Spec, UnsupportedError, grid_of
from ringcore_torch.circle import Circle
from ringcore_torch.groups import checked_group, groups_of_mesh, is_grid, next_name
from ringcore_torch.messages import GlooMessages
from ringcore_torch.nccl import NcclMessages
from ringcore_torch.peer_memory import PeerMemory
from ringcore_torch.reach import NCCL, PEER_MEMORY, check_carrier, choose_carrier

_rings: WeakKeyDictionary[Any, TorchTransport] = WeakKeyDictionary()


class TorchTransport:
    """A ring over a process group; implements `ringcore.Transport`.

    group: a ProcessGroup, or a DeviceMesh of one dimension. The ring makes connections of its own among the same
        processes, so that its messages never meet yours. Ranks count within the group.
    node: ranks with equal numbers count as one machine; None takes the machines as they are.
    timeout: seconds that a rank waits for its peers; None takes RINGCORE_TIMEOUT from the environment, or 120.
    carrier: how blocks on GPUs travel. "peer_memory": each GPU reads and writes the others' memory; "nccl": as NCCL's
        messages; None takes peer memory if all GPUs reach each other's, else NCCL. Blocks in host memory go over gloo.

    Making one is collective. One call at a time: a second thread needs a ring of its own.

    Attributes: rank, size, node, sharers as in `ringcore.Transport`.
    Raises TransportError if there is no ring to be had: no process group, or one that this process is not in;
    KeywordError for a carrier that there is not, UnsupportedError for one that this Torch was built without.
    """

    def __init__(
        self, group: Any, *, node: int | None = None, timeout: float | None = None, carrier: str | None = None
    ) -> None:
        check_carrier(carrier)
        group = checked_group(group)
        self._circle = Circle(group, next_name(group), timeout)
        self._messages = GlooMessages(self._circle)
        self.rank, self.size = self._circle.rank, self._circle.size
        place = f"machine {platform.node()}" if node is None else f"node {node}"
        places = self._circle.gather(place.encode())
        self.node = places.index(place.encode())
        self.sharers = places.count(place.encode())
        self._asked = carrier
        self._carrier: PeerMemory | NcclMessages | None = None  # made at the first call with blocks on a GPU
        self._device: torch.device | None = None  # that GPU

    @property
    def explain(self) -> str:
        """How blocks travel."""
        ways = {PEER_MEMORY: PeerMemory.explain, NCCL: NcclMessages.explain}
        either = f"{PeerMemory.explain}; or, if they do not reach each other's memory, {NcclMessages.explain}"
        gpus = self._carrier.explain if self._carrier else ways.get(self._asked or "", either)
        return f"torch.distributed, rank {self.rank} of {self.size}; {self._messages.explain}; blocks on GPUs: {gpus}"

    @property
    def messages_sent(self) -> int:
        """How many tensors of blocks have left this rank."""
        return self._messages.messages_sent + (self._carrier.messages_sent if self._carrier else 0)

    @property
    def bytes_sent(self) -> int:
        """How many bytes of blocks have left this rank; those that others read from its memory are not counted."""
        return self._messages.bytes_sent + (self._carrier.bytes_sent if self._carrier else 0)

    def check(self, *arrays: Any) -> None:
        """Raise UnsupportedError unless all are tensors that can travel from where they are."""
        if not all(isinstance(x, torch.Tensor) and x.is_cuda for x in arrays):
            self._messages.check(*arrays)
        elif arrays[0].device.index != torch.cuda.current_device():
            raise UnsupportedError(
                f"the tensors are on {arrays[0].device}, but rank {self.rank} works on GPU "
                f"{torch.cuda.current_device()}. Call torch.cuda.set_device({arrays[0].device.index}) first."
            )
        elif self._device not in (None, arrays[0].device):
            raise UnsupportedError(
                f"the tensors are on {arrays[0].device}, but this ring's connections on rank {self.rank} are those of "
                f"{self._device}. Make another ring for them: ring=torch.distributed.new_group(...)."
            )

    def check_schedule(self, schedule: Any, x: Any) -> None:
        """Raise UnsupportedError for peer memory, in which accumulators go on to one rank alone."""
        if x.is_cuda and self._asked != NCCL:
            raise UnsupportedError(
                f"schedule is {schedule!r}, which orders messages, but this ring may read blocks straight from the "
                "memory of their owner's GPU. Leave it out, or have messages sent: "
                'ring=TorchTransport(group, carrier="nccl").'
            )

    def capturing(self) -> bool:
        """Whether the caller's work is recorded for a graph, not run."""
        initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return initialized and torch.cuda.is_current_stream_capturing()

    def reaches(self, reader: int, owner: int) -> bool:
        """Whether ``reader`` can fetch what ``owner`` published."""
        return self._carrier is not None and self._carrier.in_place and reader != owner

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]] | None = None,
    ) -> bool:
        """Begin a call on GPUs: where they have peer memory, make this rank's blocks readable by all.

        False for blocks in host memory, which go as messages.
        """
        if not blocks[0].is_cuda:
            return False
        self._on(blocks[0].device).publish(blocks, specs, carried or {})
        return True

    def shares(self, x: torch.Tensor) -> torch.Tensor | None:
        """All ranks' tensors, stacked, where GPUs have peer memory."""
        carrier = self._on(x.device) if x.is_cuda else None
        return carrier.shares.of_all(x) if isinstance(carrier, PeerMemory) else None

    def _on(self, device: torch.device) -> PeerMemory | NcclMessages:
        """The carrier of blocks on this GPU. The first call is collective."""
        if self._carrier is None:
            peers = choose_carrier(self._circle, device, self._asked) == PEER_MEMORY
            self._carrier = (PeerMemory if peers else NcclMessages)(self._circle, device)
            self._device = device
        return self._carrier

    def fetch(self, owner: int, rows: slice | None, seen: slice | None = None) -> Blocks:
        """What ``owner`` published, there once the exchange that follows was waited for."""
        if not isinstance(self._carrier, PeerMemory):
            raise LookupError("nothing was published")
        return self._carrier.fetch(owner, rows, seen)

    def retire(self) -> None:
        """The end of a call on GPUs: no rank reads published blocks, or sends, after this. Collective."""
        if self._carrier is None:
            raise LookupError("nothing was published")
        self._carrier.retire()

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note, in the order of ranks."""
        try:
            return self._circle.gather(note)
        except RingcoreError as error:
            self.abort(error)  # the ring has ended: what is under way between GPUs must not wait for it
            raise

    def exchange(
        self,
        kind: str,
        sends: Sequence[tuple[Move, Blocks]],
        receives: Sequence[tuple[Move, Sequence[Spec]]],
    ) -> Pending:
        """Start all sends and receives; blocks stay untouched until the answer's wait returns."""
        like = [x for _, blocks in sends for x in blocks] + [spec.like for _, specs in receives for spec in specs]
        if self._carrier is not None and all(x.is_cuda for x in like):
            return self._carrier.exchange(kind, sends, receives)
        return self._messages.exchange(kind, sends, receives)

    def abort(self, error: BaseException) -> None:
        """Tell every peer that this rank failed; the ring is of no use afterwards."""
        self._circle.abort(error)
        if self._carrier is not None:
            self._carrier.abort()


def adapt(ring: Any) -> TorchTransport | Grid:
    """The ring of this process group or mesh, made at the first call and kept as long as the group.

    A mesh of "ring" and "heads" is a grid: rings run along the first one, heads are dealt along the second.
    The first call is collective. Raises TransportError or KeywordError if no ring can be made of it.
    """
    if is_grid(ring):
        between, inside = (_ring_of(checked_group(group)) for group in groups_of_mesh(ring))
        return grid_of(between, inside)
    return _ring_of(checked_group(ring))


def _ring_of(group: Any) -> TorchTransport:
    transport = _rings.get(group)
    if transport is None:
        transport = _rings[group] = TorchTransport(group)
    return transport
