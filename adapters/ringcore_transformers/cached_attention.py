"""Attention of new tokens, which every rank has, over a RingCache, whose positions the ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ringcore import (
    AgreementError,
    Kernels,
    KeywordError,
    ShapeError,
    UnsupportedError,
    decode_attention,
    find_transport,
)
from ringcore_transformers.agreement import settled_before, together
from ringcore_transformers.cache_layer import NewKeys
from ringcore_transformers.model_mask import ModelMask, Settled

# Of the numbers by which ranks see whether they have the same tokens: far more than two devices differ by in bfloat16
# at the first layer, far less than two tokens do.
TOLERANCE = 0.02


def attend_to_cache(
    new: NewKeys, query: torch.Tensor, mask: ModelMask, check: Callable[[], None], *, ring: Any,
    ring_size: int | None, kernels: Kernels | str | None, scale: float | None, softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Attention of one layer [B, H, S, E], the same on every rank: the new keys are written, then all are seen.

    query: [B, H, S, D], the same on every rank. check: what else may be wrong with the call; the others hear of it.
    If this raises, as it does on every rank then, the layer holds what it held.
    """
    rank, size, abort = 0, 1, None
    if ring is not None:
        transport = find_transport(ring)
        rank, size, abort = transport.rank, transport.size, transport.abort
    padding = _settle(ring, mask, query, new, check)
    try:
        held = new.layer.write(new, padding, rank, size, mask.window[0])
    except BaseException as error:  # such as too little memory, for which the others would wait
        if abort is not None:
            abort(error)
        raise
    out: torch.Tensor
    out, _ = decode_attention(
        query, held.keys, held.values, ring=ring, ring_size=ring_size, causal=True, window=mask.window, scale=scale,
        softcap=softcap, sinks=None if sinks is None else sinks.detach(), key_lengths=held.key_lengths,
        query_offset=held.query_offset, layout="striped", kernels=kernels,
    )  # fmt: skip
    new.layer.keep(new)
    return out


def check_cached(
    new: NewKeys, query: torch.Tensor, mask: ModelMask, sinks: torch.Tensor | None, *, documents: bool
) -> None:
    """Raise UnsupportedError, by name, for what attention over a RingCache lacks."""
    trained = any(x is not None and x.requires_grad for x in (query, new.keys, new.values, sinks))
    lacking = {
        "attention that is not causal, or to another sequence": not mask.causal,
        "chunks": mask.chunk is not None,
        "packed documents (cu_seq_lens_q and cu_seq_lens_k)": documents or mask.packed,
        "other layers that have none": any(settled.left is None for settled in mask.settled),
        "gradients: call the model under torch.no_grad(), or give it use_cache=False": trained
        and torch.is_grad_enabled(),
    }
    for name, asked in lacking.items():
        if asked:
            raise UnsupportedError(f"the model asks for attention over a RingCache with {name}, which it lacks.")
    rows, length = query.shape[2], new.layer.length
    if new.keys.shape[2] != rows:
        raise UnsupportedError(
            f"attention over a RingCache has {rows} queries, but {new.keys.shape[2]} new keys: attention to another "
            "sequence, which it lacks."
        )
    if mask.columns is not None and (mask.first, mask.columns) != (length, range(length + rows)):
        raise KeywordError(
            f"the model's mask has queries from {mask.first} on and the keys {mask.columns}, but its RingCache has "
            f"{length} tokens in this layer and gets {rows}. All layers must take part in every forward pass."
        )


def _settle(
    ring: Any, mask: ModelMask, query: torch.Tensor, new: NewKeys, check: Callable[[], None]
) -> tuple[int, ...]:  # fmt: skip
    """The padding on the left of each batch entry; the first layer of a forward pass asks the other ranks."""
    if (found := settled_before(ring, mask, check)) is None:

        def describe() -> dict[str, Any]:
            check()
            padding = _left_padding(mask.padding, query.shape[0], new.layer.length + query.shape[2])
            return {
                "rows": query.shape[2],
                "past": new.layer.length,
                "padding": padding,
                **({} if ring is None else _sample(query)),
            }

        notes = together(ring, describe)
        _compare(notes)
        mask.settled.append(found := Settled(None, None, tuple(notes[0]["padding"])))
    return found.left or ()


def _left_padding(padding: torch.Tensor | None, entries: int, columns: int) -> tuple[int, ...]:
    if padding is None:
        return (0,) * entries
    if tuple(padding.shape) != (entries, columns):
        raise ShapeError(
            f"attention_mask has shape {tuple(padding.shape)}, but over a RingCache it must be {(entries, columns)}: "
            "of all tokens, those in the cache too, on every rank."
        )
    tokens = padding.to(torch.bool)
    counts = columns - tokens.sum(1)
    wrong = tokens != (torch.arange(columns, device=tokens.device) >= counts[:, None])
    if wrong.any():
        entry, column = wrong.nonzero()[0].tolist()
        raise UnsupportedError(
            f"attention_mask has {int(counts[entry])} of {columns} columns of padding in batch entry {entry}, but says "
            f"{'token' if tokens[entry, column] else 'padding'} in column {column}: over a RingCache padding is on the "
            "left alone. Set the tokenizer's padding_side to 'left'."
        )
    return tuple(counts.tolist())


def _sample(query: torch.Tensor) -> dict[str, Any]:
    """A few numbers of each batch entry that other tokens would change."""
    few = query[:, 0, :, :8].float()
    sums = few.sum(1) / max(1, few.shape[1]) ** 0.5  # as large for many rows as for one, if rows do not agree
    return {"sample": sums.tolist(), "largest": float(few.abs().max()) if few.numel() else 0.0}


def _compare(notes: list[dict[str, Any]]) -> None:
    first = notes[0]
    for rank, note in enumerate(notes[1:], 1):
        for name, what in (("rows", "new tokens"), ("past", "tokens in its cache"), ("padding", "padding on the left")):
            if note[name] != first[name]:
                raise AgreementError(
                    f"rank 0 has {what}: {first[name]}, but rank {rank}: {note[name]}. Over a RingCache every rank "
                    "gets the same whole batch, and has a cache of its own for it."
                )
        allowed = TOLERANCE * first["largest"]
        for entry, (mine, due) in enumerate(zip(note["sample"], first["sample"], strict=True)):
            if any(abs(x - y) > allowed for x, y in zip(mine, due, strict=True)):
                raise AgreementError(
                    f"batch entry {entry} has other tokens on rank {rank} than on rank 0. Over a RingCache every rank "
                    "gets the same whole batch, weights and generation settings; if it samples, call "
                    "torch.manual_seed with the same seed on every rank before."
                )
