"""Blocks in host memory as gloo's messages, which gloo's own threads move while tiles are computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ringcore import Blocks, Move, Spec, UnsupportedError
from ringcore_torch.circle import FIRST_BLOCK_TAG, Circle

KINDS = ("visiting", "carried")

Sends = Sequence[tuple[Move, Blocks]]
Receives = Sequence[tuple[Move, Sequence[Spec]]]


class GlooMessages:
    """How blocks in host memory travel; messages_sent and bytes_sent count them."""

    explain = "messages: gloo, whose threads move them on"

    def __init__(self, circle: Circle) -> None:
        self._circle = circle
        self.messages_sent = self.bytes_sent = 0

    def check(self, *arrays: Any) -> None:
        """Raise UnsupportedError unless all are tensors in host memory."""
        for x in arrays:
            if not isinstance(x, torch.Tensor):
                kind = f"{type(x).__module__}.{type(x).__qualname__}"
                raise UnsupportedError(
                    f"an array is a {kind}; a ring over torch.distributed carries tensors. Convert q, k and v with "
                    "torch.as_tensor first."
                )
            if x.device.type != "cpu":
                raise UnsupportedError(
                    f"a tensor is on {x.device}, but this ring's messages go over gloo, which carries host memory. "
                    "Move q, k and v there first: x.cpu()."
                )

    def exchange(self, kind: str, sends: Sends, receives: Receives) -> Exchange:
        """Start all sends and receives."""
        for _, blocks in sends:
            self.messages_sent += sum(x.numel() > 0 for x in blocks)
            self.bytes_sent += sum(x.nbytes for x in blocks)
        with self._circle.starting():
            return Exchange(self._circle, kind, sends, receives)


class Exchange:
    """Blocks under way, some of them leaving and some arriving; all were started when this was made."""

    def __init__(self, circle: Circle, kind: str, sends: Sends, receives: Receives) -> None:
        self._circle, self._kind = circle, kind
        self._arrived = {move: tuple(spec.empty() for spec in specs) for move, specs in receives}
        # Kept until they have left.
        self._leaving = [(move, tuple(x.detach().contiguous() for x in blocks)) for move, blocks in sends]
        self._works: list[tuple[Any, str]] = []
        self._ended = False
        for move, x in tensors(self._arrived.items()):
            self._begin(circle.gloo.recv, move, x, f"a {kind} block from rank {move.peer}")
        for move, x in tensors(self._leaving):
            self._begin(circle.gloo.send, move, x, f"a {kind} block to leave for rank {move.peer}")

    def wait(self) -> Mapping[Move, Blocks]:
        """The blocks that arrived, once those that leave have left too."""
        if not self._ended:
            self._ended = True
            deadline = time.monotonic() + self._circle.timeout
            for work, waiting_for in self._works:
                self._circle.wait(work, waiting_for, deadline)
            self._works, self._leaving = [], []
            self._circle.finished()
        return self._arrived

    def _begin(self, operation: Any, move: Move, x: torch.Tensor, waiting_for: str) -> None:
        tag = FIRST_BLOCK_TAG + KINDS.index(self._kind) * self._circle.size + move.block
        self._works.append((self._circle.begin(operation, x, move.peer, tag, waiting_for), waiting_for))


def tensors(moves: Any) -> Iterator[tuple[Move, torch.Tensor]]:
    """All tensors that are not empty, in an order that does not depend on how the moves were listed.

    Messages that share a peer and a tag arrive in the order in which they left.
    """
    for move, blocks in sorted(moves, key=lambda item: _order(item[0])):
        for x in blocks:
            if x.numel():
                yield move, x


def _order(move: Move) -> tuple[int, int, int]:
    return move.peer, move.block, 0 if move.rows is None else move.rows.start
