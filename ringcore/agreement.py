"""The agreement at the start of every call on a ring of processes: same call, same shapes, same keywords.

It comes before any tensor data, so that a mistake on one rank is an error on every rank and never a hang.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ringcore.arguments import Arguments
from ringcore.errors import AgreementError, PeerError
from ringcore.layout import Layout
from ringcore.partial import device_kind
from ringcore.protocols import Transport

Checked = TypeVar("Checked")
Note = dict[str, Any]


@dataclass(frozen=True)
class Agreed:
    """What the ranks told each other: how many rows of q and of k each one holds, and a name for this call."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    call: str


def agree(transport: Transport, check: Callable[[], tuple[Checked, Note]]) -> tuple[Checked, Agreed]:
    """Run ``check`` on every rank and compare the notes that it returns.

    Raises this rank's own error; PeerError if another rank's check failed; AgreementError if the notes differ
    in anything but the local lengths.
    """
    failure: Exception | None = None
    try:
        checked, note = check()
    except Exception as error:  # whatever is wrong here, the peers must hear of it before this rank leaves
        failure, note = error, {"error": f"{type(error).__name__}: {error}"}
    note = {**note, "name": os.urandom(8).hex()}
    notes = [json.loads(answer) for answer in transport.gather(json.dumps(note).encode())]
    if failure is not None:
        raise failure
    for rank, other in enumerate(notes):
        if "error" in other:
            raise PeerError(f"rank {rank} refused the call, so rank {transport.rank} did too: {other['error']}")
    lengths = [other.pop("lengths", (0, 0)) for other in notes]
    names = [other.pop("name") for other in notes]
    for rank, other in enumerate(notes):
        _compare(notes[0], other, rank)
    q_lengths, k_lengths = zip(*lengths, strict=True)
    return checked, Agreed(tuple(q_lengths), tuple(k_lengths), names[0])


def note_of(call: str, arguments: Arguments, **further: Any) -> Note:
    """What must be equal on all ranks of a call, plus this rank's lengths."""
    q, k, v = arguments.q, arguments.k, arguments.v
    columns = {
        f"{name} columns": f"no {name}" if term is None else term.shape[3]
        for name, term in (("bias", arguments.bias), ("mask", arguments.mask))
    }
    return {
        "call": call,
        "batch": q.shape[0],
        "heads": q.shape[1],
        "key heads": k.shape[1],
        "width of q and k": q.shape[3],
        "width of v": v.shape[3],
        "dtype": arguments.dtype,
        "kind of device": device_kind(q),
        "causal": arguments.causal,
        "window": arguments.window,
        "scale": arguments.score.scale,
        "softcap": arguments.score.softcap,
        "query_offset": arguments.offsets,
        "key_lengths": arguments.key_lengths,
        "layout": _layout_note(arguments.layout),
        **columns,
        **further,
        "lengths": (q.shape[2], k.shape[2]),
    }


def _compare(due: Note, came: Note, rank: int) -> None:
    for name in {**due, **came}:
        if due.get(name) != came.get(name):
            raise AgreementError(
                f"the ranks disagree on {name}: {due.get(name)!r} on rank 0, {came.get(name)!r} on rank {rank}. "
                "Every rank must make the same call, with its own shard of q, k and v."
            )


def _layout_note(layout: str | Layout) -> str:
    if isinstance(layout, str):
        return layout
    return f"{layout.name} {hashlib.sha256(repr(layout.shards).encode()).hexdigest()[:16]}"
