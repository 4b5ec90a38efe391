"""Blocks on GPUs as messages between streams: the host starts them, and waits for none of them.

A channel is what NCCL calls a communicator. It runs what is posted on it one after the other, and a send is no letter
that waits in a box: it ends when the receiver comes to the matching receive, and holds up all that was posted after
it. So ranks that post in different orders wait for each other for ever. What is posted as one group runs at once.

Visiting blocks have a channel of their own. The plan receives a block in the step in which it is sent, so that what a
step moves is one group, and all ranks post their groups in the order of steps.

Accumulators that hop on leave at the end of a step, and the next rank asks for them at the beginning of its next one.
Posted as they come, every rank would wait with its send for a neighbour that waits with its own. So a send is kept
until this rank asks for the accumulators of its next step, and both are one group; or, as there may be none to ask
for, until it is about to wait for something that was begun later, which its neighbour may be unable to bring about
before it got these.

Accumulators that go home are asked for before all else, and sent at any step, while their owner may be steps behind.
Both ends post them last: no step waits for them. The price is that the last guest of a block keeps its accumulators
until its own steps are over, which are more than one block's only where blocks end their ways at different steps, as
in a causal contiguous layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ringcore import Blocks, Move
from ringcore_torch.messages import Receives, Sends, tensors

Letters = Sequence[tuple[int, torch.Tensor]]
"""Ranks, and contiguous tensors that go to them or come from them."""


class Channel(Protocol):
    """Operations between ranks that run in the order in which they were posted, beside the caller's stream.

    A mark stands for a place in a stream.
    """

    def ready(self) -> Any:
        """A mark behind all that the caller's stream was given so far."""
        ...

    def post(self, sends: Letters, receives: Letters, marks: Sequence[Any]) -> Any:
        """Post one group that begins behind ``marks``; the mark behind it."""
        ...

    def order(self, mark: Any) -> None:
        """What the caller's stream is given from now on begins behind ``mark``."""
        ...


@dataclass(eq=False)
class Group:
    """What is posted as one, and kept until the caller's stream goes on behind it.

    number: that of the first exchange in it. marks: behind what it begins. done: the mark behind it, once posted.
    """

    number: int
    sends: list[tuple[Move, Blocks]] = field(default_factory=list)
    receives: list[tuple[Move, Blocks]] = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)
    done: Any = None

    def add(self, sends: Sends, receives: Sends, mark: Any) -> None:
        """Take these too."""
        self.sends += sends
        self.receives += receives
        self.marks.append(mark)

    def post(self, channel: Channel) -> None:
        """Post it. Empty tensors send nothing, on both ends."""
        sends, receives = ([(move.peer, x) for move, x in tensors(moves)] for moves in (self.sends, self.receives))
        self.done = channel.post(sends, receives, self.marks) if sends or receives else self.marks[-1]


class StreamMessages:
    """One rank's messages in a call; messages_sent and bytes_sent count them.

    check: raises if the ring has ended.
    """

    explain = "messages: NCCL, on streams beside the kernels"
    in_place = False

    def __init__(self, rank: int, visiting: Channel, carried: Channel, check: Callable[[], None]) -> None:
        self._rank, self._check = rank, check
        self._visiting, self._carried = visiting, carried
        self._number = 0
        self._hop: Group | None = None  # sends that wait for a receive
        self._home: Group | None = None  # all that goes home in this call
        self.messages_sent = self.bytes_sent = 0

    def exchange(self, kind: str, sends: Sends, receives: Receives) -> Exchange:
        """Start all sends and receives, at once or in the group that they belong to."""
        self._check()
        self._number += 1
        arriving = [(move, tuple(spec.empty() for spec in specs)) for move, specs in receives]
        leaving = [(move, tuple(x.detach().contiguous() for x in blocks)) for move, blocks in sends]
        for _, x in tensors(leaving):
            self.messages_sent += 1
            self.bytes_sent += x.nbytes
        if kind == "visiting":
            group = Group(self._number)
            group.add(leaving, arriving, self._visiting.ready())
            group.post(self._visiting)
            return Exchange(self, self._number, dict(arriving), [(self._visiting, group)])
        mark = self._carried.ready()
        groups = []
        home = [x for x in leaving if x[0].block == x[0].peer], [x for x in arriving if x[0].block == self._rank]
        if any(home):
            if self._home is None or self._home.done is not None:
                self._home = Group(self._number)
            self._home.add(*home, mark)
            if home[1]:
                groups.append((self._carried, self._home))
        hops = [x for x in leaving if x[0].block != x[0].peer], [x for x in arriving if x[0].block != self._rank]
        if any(hops):
            self._hop = self._hop or Group(self._number)
            self._hop.add(*hops, mark)
            groups.append((self._carried, self._hop))
            if hops[1]:
                self._post_hop()
        return Exchange(self, self._number, dict(arriving), groups)

    def retire(self) -> None:
        """The call's last: what the caller's stream is given from now on may overwrite all that was sent."""
        self._check()
        self._post_hop()
        if self._home is not None:
            self._end(self._home)
            self._carried.order(self._home.done)
            self._home = None

    def before_waiting(self, exchange: Exchange) -> None:
        """Post what must be under way before the caller's stream waits for this exchange."""
        self._check()
        if self._hop is not None and (self._hop.number < exchange.number or exchange.has(self._hop)):
            self._post_hop()
        if self._home is not None and exchange.has(self._home):
            self._post_hop()
            self._end(self._home)

    def _post_hop(self) -> None:
        if self._hop is not None:
            self._hop.post(self._carried)
            self._hop = None

    def _end(self, home: Group) -> None:
        if home.done is None:
            home.post(self._carried)


class Exchange:
    """Blocks under way or about to be; implements `ringcore.Pending`."""

    def __init__(
        self, messages: StreamMessages, number: int, arriving: Mapping[Move, Blocks],
        groups: list[tuple[Channel, Group]],
    ) -> None:  # fmt: skip
        self._messages, self._arriving, self._groups = messages, arriving, groups
        self.number = number

    def has(self, group: Group) -> bool:
        """Whether the group holds a part of this exchange that somebody waits for."""
        return any(group is mine for _, mine in self._groups)

    def wait(self) -> Mapping[Move, Blocks]:
        """What arrives, for work that the caller's stream is given from now on.

        Accumulators that leave for home are waited for at the end of the call: nobody touches them before.
        """
        self._messages.before_waiting(self)
        for channel, group in self._groups:
            channel.order(group.done)
        self._groups = []
        return self._arriving
