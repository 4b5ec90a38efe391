"""Blocks as NCCL's messages, on a stream beside the kernels.

What is posted on a communicator runs one after the other, and a send ends only when its receiver comes to it. So all
ranks post in one order: the visiting blocks of a step as one group, then that step's accumulators as one. Those leave
at the end of the step before, but every rank would then wait with its send for a neighbour that waits with its own: a
send is kept until this rank asks for accumulators itself, and both are one group; or, as there may be none to ask for,
until it is about to wait for something that was begun later. Accumulators that go home are posted last of all: they
are asked for first, and sent at any step.

NCCL itself has no deadline. So ranks tell each other by tokens, messages of one byte over the host's transport, that
they have posted, and a stream is made to wait only for what both sides have: a rank that failed or is late is then an
error of the host's transport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy as np
from cupy.cuda import nccl

from ringcore import Blocks, Move, Spec, Transport, TransportError
from ringcore_cupy.connecting import Connection
from ringcore_cupy.streams import Side, mark

_TOKEN = Spec((1,), np.empty(0, np.uint8), np.dtype(np.uint8))
_SAID = np.zeros(1, np.uint8)

Moves = list[tuple[Move, Blocks]]


@dataclass(eq=False)
class Group:
    """What is posted as one.

    number: that of the first exchange in it. marks: behind what it begins. done: the mark behind it, once posted.
    tokens: that the other ends have posted too.
    """

    number: int
    sends: Moves = field(default_factory=list)
    receives: Moves = field(default_factory=list)
    marks: list[Any] = field(default_factory=list)
    done: Any = None
    tokens: Any = None


class NcclMessages:
    """One rank's messages in a call; messages_sent and bytes_sent count them.

    connection: this rank's end, made together with all ranks.
    """

    explain = "messages of NCCL, on a stream beside the kernels"

    def __init__(self, host: Transport, connection: Connection) -> None:
        self._host, self._connection = host, connection
        self._side = Side()
        self._number = 0
        self._hop: Group | None = None  # sends that wait for a receive
        self._home: Group | None = None  # all that goes home in this call
        self._open: list[Group] = []  # posted, and nobody has waited for the tokens
        self.messages_sent = self.bytes_sent = 0

    def exchange(
        self, kind: str, sends: Sequence[tuple[Move, Blocks]], receives: Sequence[tuple[Move, Sequence[Spec]]]
    ) -> Exchange:
        """Start all sends and receives, at once or in the group that they belong to."""
        self._number += 1
        arriving = [(move, tuple(cupy.empty(spec.shape, spec.dtype) for spec in specs)) for move, specs in receives]
        leaving = [(move, tuple(cupy.ascontiguousarray(x) for x in blocks)) for move, blocks in sends]
        for _, blocks in leaving:
            self.messages_sent += len(blocks)
            self.bytes_sent += sum(x.nbytes for x in blocks)
        behind = mark(cupy.cuda.get_current_stream())
        groups: list[Group] = []
        if kind == "visiting":
            if leaving or arriving:
                groups.append(Group(self._number, leaving, arriving, [behind]))
                self._post(kind, groups[0])
            return Exchange(self, self._number, dict(arriving), groups)
        home = [x for x in leaving if x[0].block == x[0].peer], [x for x in arriving if x[0].block == self._host.rank]
        hops = [x for x in leaving if x[0].block != x[0].peer], [x for x in arriving if x[0].block != self._host.rank]
        if any(home):
            self._home = self._added(self._home, *home, behind)
            if home[1]:  # nobody waits for those that leave before the end of the call
                groups.append(self._home)
        if any(hops):
            self._hop = self._added(self._hop, *hops, behind)
            groups.append(self._hop)
            if hops[1]:
                self._post_hop()
        return Exchange(self, self._number, dict(arriving), groups)

    def before_waiting(self, number: int, groups: Sequence[Group]) -> None:
        """Post what must be under way before anything waits for this exchange, and hear that its peers have."""
        if self._hop is not None and (self._hop.number < number or self._hop in groups):
            self._post_hop()
        if self._home is not None and self._home in groups:
            self.post_rest()
        for group in groups:
            self._heard(group)

    def post_rest(self) -> Mapping[Move, Blocks]:
        """Post all that was kept: no step of this rank follows, but peers may need it for theirs. Nothing arrives."""
        self._post_hop()
        self._post_home()
        return {}

    def retire(self) -> None:
        """The call's last: what the caller's stream is given from now on may overwrite all that was sent."""
        self.post_rest()
        for group in list(self._open):
            self._heard(group)
        if self._home is not None:
            cupy.cuda.get_current_stream().wait_event(self._home.done)
            self._home = None

    def abort(self) -> None:
        """End what is under way, so that no stream of this rank waits for a peer."""
        self._connection.abort()
        self._hop = self._home = None
        self._open = []

    def close(self) -> None:
        """Let go of the connections."""
        self._connection.close()

    def _added(self, group: Group | None, sends: Moves, receives: Moves, behind: Any) -> Group:
        group = group or Group(self._number)
        group.sends += sends
        group.receives += receives
        group.marks.append(behind)
        return group

    def _post_hop(self) -> None:
        if self._hop is not None:
            group, self._hop = self._hop, None
            self._post("carried", group)

    def _post_home(self) -> None:
        if self._home is not None and self._home.done is None:
            self._post("carried", self._home)

    def _post(self, kind: str, group: Group) -> None:
        """Post it on the stream beside the caller's, behind its marks. Empty arrays send nothing, on both ends."""
        stream = self._side.stream
        for behind in group.marks:
            stream.wait_event(behind)
        try:
            self._connection.post(_letters(group.sends), _letters(group.receives), stream)
        except nccl.NcclError as error:
            raise TransportError(f"NCCL failed on rank {self._host.rank}: {error}") from error
        group.done = mark(stream)
        moves = sorted({(move.peer, move.block) for move, _ in group.sends + group.receives})
        tokens = [Move(peer, block) for peer, block in moves]
        group.tokens = self._host.exchange(
            kind, [(move, (_SAID,)) for move in tokens], [(move, (_TOKEN,)) for move in tokens]
        )
        self._open.append(group)

    def _heard(self, group: Group) -> None:
        """Wait, on the host, until the other ends have posted their parts."""
        if group in self._open:
            group.tokens.wait()
            self._open.remove(group)


class Exchange:
    """Blocks under way or about to be; a `ringcore.Pending`."""

    def __init__(
        self, messages: NcclMessages, number: int, arriving: Mapping[Move, Blocks], groups: list[Group]
    ) -> None:
        self._messages, self._number, self._arriving, self._groups = messages, number, arriving, groups

    def wait(self) -> Mapping[Move, Blocks]:
        """What arrives, for work that the caller's stream is given from now on."""
        self._messages.before_waiting(self._number, self._groups)
        for group in self._groups:
            cupy.cuda.get_current_stream().wait_event(group.done)
        self._groups = []
        return self._arriving


def _letters(moves: Moves) -> list[tuple[int, Any]]:
    """Every array and whom it goes to or comes from, in an order that both ends know."""
    ordered = sorted(moves, key=lambda item: (item[0].peer, item[0].block, item[0].rows.start if item[0].rows else 0))
    return [(move.peer, x) for move, blocks in ordered for x in blocks if x.nbytes]
