"""A batch split over the ring: each rank's tokens, with what the next rank holds already looked up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from ringcore import Documents, KeywordError, Layout, LayoutError, ShapeError, UnsupportedError, resolve_layout, shard

IGNORED = -100  # the label that counts for nothing, in transformers and in torch's cross_entropy

# What is split, along axis 1; anything else in a batch would have to be understood first.
WHOLE = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"  # of packed documents, for every rank
BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels", "shift_labels")


def split_batch(
    batch: Mapping[str, torch.Tensor], layout: str | Layout, rank: int, size: int, *, causal: bool = True
) -> dict[str, torch.Tensor]:
    """Rank ``rank``'s part of a whole batch, for a model whose attention runs over a ring of ``size`` ranks.

    batch: out of "input_ids", "attention_mask", "token_type_ids", "labels", "shift_labels" [B, N] and "inputs_embeds"
        [B, N, width], the same on every rank. N need not be divisible by ``size``, but every rank needs a token.
    causal: a token's label is the next token, which another rank may hold. So "labels" come out as "shift_labels",
        moved by one before the split, the last one -100: never give them to a model as its ``labels``, which it would
        move again; use `ringcore_transformers.loss`. False: for masked language models "labels" stay in place.

    Packed documents: "cu_seq_lens_q" and "cu_seq_lens_k", where they begin and end in the whole sequence, as
        transformers' DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives them, with "max_length_q" and
        "max_length_k". Every rank gets them as they are; positions begin anew with each document.

    Returns the parts, [B, S] or [B, S, width], and "position_ids" [B, S] int64, the positions that the layout gives
    this rank: a model must get them, because by default it counts from 0 on every rank.

    Raises KeywordError for a name that is not listed above, ShapeError for lengths that differ, LayoutError for a rank
    without tokens, UnsupportedError for position ids that are not those of the documents.
    """
    packed = {name: batch[name] for name in WHOLE if name in batch}
    batch = {name: x for name, x in batch.items() if name not in WHOLE}
    length, entries, device = _measure(batch)
    dealt = resolve_layout(layout, length, size, "the batch")
    if not 0 <= rank < size:
        raise LayoutError(f"rank is {rank}, but the ring has {size} ranks: 0 to {size - 1}.")
    if 0 in dealt.lengths:
        raise LayoutError(
            f"{dealt.name} over {size} ranks leaves rank {dealt.lengths.index(0)} none of {length} tokens, and models "
            f"do not run on none. Use at most {length} ranks, or longer batches."
        )
    whole = dict(batch)
    positions = _positions(packed, length).to(device).expand(entries, length)
    if (whole.setdefault("position_ids", positions) != positions).any():
        raise UnsupportedError(
            "the batch has position_ids other than 0, 1, 2, ... within each document. Documents that are packed are "
            "told by cu_seq_lens_q and cu_seq_lens_k; padding on the left ring attention under transformers lacks. "
            "Leave position_ids out, and pad on the right."
        )
    if causal and "labels" in whole:
        if "shift_labels" in whole:
            raise KeywordError("the batch has labels and shift_labels; leave one out, or say causal=False.")
        whole["shift_labels"] = pad(whole.pop("labels")[:, 1:], (0, 1), value=IGNORED)
    return {name: shard(x, dealt, rank, size, axis=1).contiguous() for name, x in whole.items()} | packed


def _positions(packed: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    """Of each token its place in its document."""
    if not packed:
        return torch.arange(length)
    lacking = [name for name in WHOLE[:2] if name not in packed]
    if lacking:
        raise KeywordError(f"the batch has {', '.join(packed)}, but no {' and no '.join(lacking)}. Give both.")
    documents = Documents.from_cu_seqlens(packed["cu_seq_lens_q"].tolist())
    if documents.length != length:
        raise KeywordError(f"cu_seq_lens_q ends at {documents.length}, but the batch has {length} tokens.")
    return torch.tensor(documents.local_positions(range(length)))


def _measure(batch: Mapping[str, torch.Tensor]) -> tuple[int, int, torch.device]:
    """How many tokens and how many entries the batch has, and where it lies."""
    unknown = sorted(set(batch) - set(BY_TOKEN))
    if unknown or not batch:
        raise KeywordError(
            f"the batch holds {', '.join(unknown) or 'nothing'}; it may hold {', '.join(BY_TOKEN)}. Split anything "
            "else yourself, with ringcore.shard(x, layout, rank, size, axis=...)."
        )
    first, *others = batch.items()
    for name, x in (first, *others):
        if x.ndim < 2 or x.shape[1] != first[1].shape[1]:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}, {first[0]} {tuple(first[1].shape)}: all parts of a batch are "
                "whole, [B, N] or longer."
            )
    entries = max(x.shape[0] for x in batch.values())
    return first[1].shape[1], entries, first[1].device
