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
from ringcore.dilation import Dilation
from ringcore.documents import Documents
from ringcore.errors import AgreementError, PeerError
from ringcore.inputs import library_name
from ringcore.layout import Layout
from ringcore.partial import device_kind
from ringcore.protocols import Members

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Note:
    """What a rank tells the others of its call: ``common``, JSON that must be equal on all, and its own lengths."""

    common: bytes
    lengths: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Agreed:
    """What the ranks told each other: how many rows of q and of k each holds, a name for this call, their machines."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    call: str
    nodes: tuple[int, ...] = ()


def agree(transport: Members, check: Callable[[], tuple[Checked, Note]]) -> tuple[Checked, Agreed]:
    """Run ``check`` on every rank and compare the notes that it returns.

    Raises this rank's own error; PeerError if another rank's check failed; AgreementError if the notes differ
    in anything but the local lengths.
    """
    failure: Exception | None = None
    head: dict[str, Any] = {"name": os.urandom(8).hex(), "node": transport.node}
    common = b""
    try:
        checked, note = check()
        head["lengths"], common = note.lengths, note.common
    except Exception as error:  # whatever is wrong here, the peers must hear of it before this rank leaves
        failure, head["error"] = error, f"{type(error).__name__}: {error}"
    answers = [answer.split(b"\n", 1) for answer in transport.gather(json.dumps(head).encode() + b"\n" + common)]
    if failure is not None:
        raise failure
    try:
        heads = [json.loads(answer[0]) for answer in answers]
    except ValueError as error:  # a grid's note, for example
        raise AgreementError(
            "the ranks disagree on ring: another rank takes part in a call over other groups. Every rank must give the "
            "same ring."
        ) from error
    for rank, other in enumerate(heads):
        if "error" in other:
            raise PeerError(f"rank {rank} refused the call, so rank {transport.rank} did too: {other['error']}")
    for rank, (_, other) in enumerate(answers):
        if other != answers[0][1]:
            _explain(json.loads(answers[0][1]), json.loads(other), rank)
    q_lengths, k_lengths = zip(*(other["lengths"] for other in heads), strict=True)
    nodes = tuple(other["node"] for other in heads)
    return checked, Agreed(tuple(q_lengths), tuple(k_lengths), heads[0]["name"], nodes)


def common_of(call: str, arguments: Arguments, **further: Any) -> bytes:
    """What must be equal on all ranks of a call, as JSON."""
    q, k, v = arguments.q, arguments.k, arguments.v
    columns = {
        f"{name} columns": f"no {name}" if term is None else term.shape[3]
        for name, term in (("bias", arguments.bias), ("mask", arguments.mask))
    }
    note = {
        "call": call,
        "batch": q.shape[0],
        "heads": q.shape[1],
        "key heads": k.shape[1],
        "width of q and k": q.shape[3],
        "width of v": v.shape[3],
        "dtype": arguments.dtype,
        "library of the arrays": library_name(q),
        "kind of device": device_kind(q),
        "causal": arguments.causal,
        "window": arguments.window,
        "scale": arguments.score.scale,
        "softcap": arguments.score.softcap,
        "dropout": (arguments.score.dropout, arguments.score.seed),
        "query_offset": arguments.offsets,
        "key_lengths": arguments.key_lengths,
        "documents": _documents_note(arguments.documents),
        "sinks": "no sinks" if arguments.sinks is None else "sinks",
        "alibi": "no alibi" if arguments.alibi is None else "alibi",
        "prefix": "no prefix" if arguments.prefix_k is None else f"{arguments.prefix_k.shape[2]} keys",
        "mask of positions": _function_note(arguments.mask_of),
        "reduce_replicated": arguments.reduce_replicated,
        **_dilation_note(arguments.dilation),
        "schedule": repr(arguments.schedule),
        "layout of q": _layout_note(arguments.q_layout),
        "layout of k and v": _layout_note(arguments.k_layout),
        **columns,
        **further,
    }
    return json.dumps(note).encode()


def with_further(common: bytes, **further: Any) -> bytes:
    """What `common_of` gave, and more that must be equal on all ranks, or other values of the same."""
    return common[:-1] + b", " + json.dumps(further).encode()[1:]


def _explain(due: dict[str, Any], came: dict[str, Any], rank: int) -> None:
    for name in {**due, **came}:
        if due.get(name) != came.get(name):
            raise AgreementError(
                f"the ranks disagree on {name}: {due.get(name)!r} on rank 0, {came.get(name)!r} on rank {rank}. "
                "Every rank must make the same call, with its own shard of q, k and v."
            )


def _dilation_note(dilation: Dilation | None) -> dict[str, Any]:
    lengths, rates = ([], []) if dilation is None else zip(*dilation.branches, strict=True)
    offset = None if dilation is None else dilation.head_offset
    return {"segment_lengths": list(lengths), "dilation_rates": list(rates), "head_offset": offset}


def _documents_note(documents: Documents | None) -> str:
    if documents is None:
        return "no documents"
    digest = hashlib.sha256(repr(documents.runs).encode()).hexdigest()[:16]
    return f"{len(documents.runs[0])} of {documents.length} positions {digest}"


def _function_note(function: Any) -> str:
    """All that can be compared of a function: its name."""
    return "none" if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))


def _layout_note(layout: str | Layout) -> str:
    if isinstance(layout, str):
        return layout
    return f"{layout.name} {hashlib.sha256(repr(layout.shards).encode()).hexdigest()[:16]}"
