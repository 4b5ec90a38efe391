"""What the ranks settle once in a forward pass: that position ids fit the layout, and where padding begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from ringcore import (
    AgreementError,
    Documents,
    KeywordError,
    Layout,
    PeerError,
    ShapeError,
    UnsupportedError,
    find_transport,
    layout_of_lengths,
)
from ringcore_transformers.model_mask import ModelMask, Settled

HELPER = "Pass the batch that ringcore_transformers.split_batch gives this rank."


def settle(
    ring: Any, layout: str | Layout, mask: ModelMask, query: torch.Tensor, position_ids: torch.Tensor | None,
    ends: tuple[torch.Tensor | None, torch.Tensor | None], check: Callable[[], None],
) -> Settled:  # fmt: skip
    """The keys of each batch entry, padding left out, and packed documents, from where they end for q and for k.

    The first layer of a forward pass asks the other ranks, and all ranks raise if ``check`` or anything else fails on
    one of them. Later layers find the answer in ``mask`` and only check themselves.
    """
    rows = query.shape[2]
    if (before := settled_before(ring, mask, check)) is not None:
        return before

    def describe() -> dict[str, Any]:
        check()
        tokens = _count_tokens(mask.padding, rows)
        return {"entries": query.shape[0], "rows": rows, "tokens": tokens, "ends": _document_ends(*ends)}

    notes = together(ring, describe)
    rank = 0 if ring is None else find_transport(ring).rank
    # Without a ring of processes the whole sequence is here, in order, however it is dealt out.
    dealt = layout_of_lengths("contiguous" if ring is None else layout, [note["rows"] for note in notes], "the batch")
    packed = _documents(notes)
    found = Settled(_add_tokens(notes), _in_chunks(packed, mask.chunk, dealt.length))

    def compare() -> dict[str, Any]:
        places = torch.cat([torch.arange(r.start, r.stop, r.step) for r in dealt.shards[rank]] or [torch.arange(0)])
        due = places if packed is None else _places_in_documents(packed, dealt, rank)
        jumps = mask.packed, packed is not None
        _check_positions(position_ids, due.to(query.device), *jumps, f"rank {rank} of {dealt.size}")
        if found.key_lengths is not None:
            _check_padding(mask.padding, places.to(query.device), found.key_lengths)
        return {}

    together(ring, compare)
    mask.settled.append(found)
    return found


def settled_before(ring: Any, mask: ModelMask, check: Callable[[], None]) -> Settled | None:
    """What an earlier layer of this forward pass found; None for the first layer, which has to ask.

    Raises what ``check`` raises, on every rank, if there was an earlier layer.
    """
    if not getattr(mask, "settled", None):
        return None
    try:
        check()
    except BaseException as error:
        if ring is not None:  # the others are past this layer's check, and would wait
            find_transport(ring).abort(error)
        raise
    return mask.settled[0]


def together(ring: Any, describe: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Every rank's note; where one rank fails, all raise: itself its error, the others PeerError."""
    if ring is None:
        return [describe()]
    transport = find_transport(ring)
    failure: Exception | None = None
    try:
        note = describe()
    except Exception as error:  # whatever is wrong here, the peers must hear of it before this rank leaves
        failure, note = error, {"error": f"{type(error).__name__}: {error}"}
    notes = [json.loads(answer) for answer in transport.gather(json.dumps(note).encode())]
    if failure is not None:
        raise failure
    for rank, other in enumerate(notes):
        if "error" in other:
            raise PeerError(f"rank {rank} refused the call, so rank {transport.rank} did too: {other['error']}")
    return notes


def _count_tokens(padding: torch.Tensor | None, rows: int) -> list[int] | None:
    """How many tokens of each batch entry are here; None if all are."""
    if padding is None:
        return None
    if padding.ndim != 2 or padding.shape[1] != rows:
        raise ShapeError(f"attention_mask has shape {tuple(padding.shape)}, but this rank has {rows} tokens. {HELPER}")
    counts: list[int] = padding.sum(1).tolist()
    return None if min(counts, default=rows) == rows else counts


def _add_tokens(notes: list[dict[str, Any]]) -> tuple[int, ...] | None:
    entries = [note["entries"] for note in notes]
    if min(entries) != max(entries):
        raise AgreementError(f"the ranks have batches of {entries} entries; all must have parts of one batch. {HELPER}")
    if all(note["tokens"] is None for note in notes):
        return None
    counts = [note["tokens"] or [note["rows"]] * note["entries"] for note in notes]
    return tuple(map(sum, zip(*counts, strict=True)))


def _document_ends(of_q: torch.Tensor | None, of_k: torch.Tensor | None) -> list[int] | None:
    """Where packed documents begin and end; None if they were not given. Raises UnsupportedError, KeywordError."""
    if of_q is None and of_k is None:
        return None
    ends, others = (None if x is None else x.tolist() for x in (of_q, of_k))
    if ends != others:
        raise UnsupportedError(
            f"cu_seq_lens_q is {ends}, cu_seq_lens_k {others}: ring attention takes documents that are the same for "
            f"queries and keys. {HELPER}"
        )
    Documents.from_cu_seqlens(ends)  # which refuses what it cannot mean, here where the others hear of it
    return ends


def _documents(notes: list[dict[str, Any]]) -> Documents | None:
    for rank, note in enumerate(notes):
        if note["ends"] != notes[0]["ends"]:
            raise AgreementError(
                f"cu_seq_lens_q is {notes[0]['ends']} on rank 0, {note['ends']} on rank {rank}: every rank gets the "
                f"same, of the whole sequence. {HELPER}"
            )
    ends = notes[0]["ends"]
    return None if ends is None else Documents.from_cu_seqlens(ends)


def _in_chunks(documents: Documents | None, chunk: int | None, length: int) -> Documents | None:
    """Documents that end with chunks of the sequence as well as where they do."""
    if chunk is None or not length:
        return documents
    starts = set(range(0, length, chunk))
    if documents is not None:
        starts |= {start for start, _, _ in documents.runs[0] if start < length}
    return Documents.from_cu_seqlens([*sorted(starts), length])


def _places_in_documents(documents: Documents, dealt: Layout, rank: int) -> torch.Tensor:
    if documents.length != dealt.length:
        raise KeywordError(
            f"cu_seq_lens_q ends at {documents.length}, but there are {dealt.length} tokens over all ranks. {HELPER}"
        )
    return torch.tensor(documents.local_positions(dealt.positions(rank)), dtype=torch.long)


def _check_positions(
    position_ids: torch.Tensor | None, due: torch.Tensor, packed: bool, documents: bool, who: str
) -> None:
    if documents and position_ids is None:
        raise UnsupportedError(
            "the batch has packed documents, but this model does not show its position ids to its attention, so "
            "whether they fit cannot be told. Use another attn_implementation."
        )
    if position_ids is None:
        if packed:
            raise UnsupportedError(
                "the position ids jump, but this model does not show them to its attention: they may be those of a "
                "layout or of packed documents, and whether they fit cannot be told. Use layout='contiguous'."
            )
        return
    if position_ids.ndim != 2 or position_ids.shape[1] != due.shape[0]:
        raise ShapeError(
            f"position_ids has shape {tuple(position_ids.shape)} on {who}, which has {due.shape[0]} tokens; ring "
            f"attention takes one position for each token: [B, {due.shape[0]}] or [1, {due.shape[0]}]. {HELPER}"
        )
    wrong = position_ids != due
    if not wrong.any():
        return
    entry, token = wrong.nonzero()[0].tolist()
    restart = not documents and bool((position_ids[entry].diff() < 0).any())
    raise (UnsupportedError if restart else KeywordError)(
        f"position_ids[{entry}, {token}] is {int(position_ids[entry, token])} on {who}, but the layout gives that "
        f"token position {int(due[token])}{' of its document' if documents else ''}. "
        + ("Positions that start anew mean packed documents: say where with cu_seq_lens_q. " if restart else "")
        + f"{HELPER} To generate, give every rank whole prompts and past_key_values=ringcore_transformers.RingCache()."
    )


def _check_padding(padding: torch.Tensor | None, due: torch.Tensor, key_lengths: tuple[int, ...]) -> None:
    """That the tokens of each batch entry are its first positions, padding the rest."""
    token = due < torch.tensor(key_lengths, device=due.device)[:, None]
    wrong = ~token if padding is None else token != padding.to(torch.bool)
    if wrong.any():
        entry, row = wrong.nonzero()[0].tolist()
        raise UnsupportedError(
            f"attention_mask has {key_lengths[entry]} tokens in batch entry {entry}, but says "
            f"{'padding' if token[entry, row] else 'token'} at position {int(due[row])}: ring attention takes padding "
            "on the right alone. Set the tokenizer's padding_side to 'right'."
        )
