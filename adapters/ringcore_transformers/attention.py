"""Ring attention as transformers calls it: a function for attention and one for masks, under one name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ringcore import Kernels, KeywordError, Layout, UnsupportedError, ring_attention
from ringcore_transformers.agreement import settle
from ringcore_transformers.cache_layer import NewKeys
from ringcore_transformers.cached_attention import attend_to_cache, check_cached
from ringcore_transformers.keywords import check_dropout, check_keywords
from ringcore_transformers.model_mask import ModelMask, read_mask

# Of the kinds that a config's layer_types may name, those whose layers mix positions by attention alone.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def register(
    name: str = "ringcore",
    *,
    ring: Any = None,
    ring_size: int | None = None,
    layout: str | Layout = "contiguous",
    kernels: Kernels | str | None = None,
) -> RingAttention:
    """Make ``attn_implementation=name`` of transformers mean attention over this ring.

    name: an identifier, so that several rings can be registered side by side; the same name again replaces the ring.
    ring, ring_size, layout, kernels: as in `ringcore.ring_attention`. With ``ring`` every rank's model gets its own
        shard of the batch, see `split_batch`; without, whole batches, and a ring of ``ring_size`` in this process.

    Returns what was registered. Raises KeywordError for a name that is no identifier or that is taken.
    """
    if not name.isidentifier() or "flash" in name:
        raise KeywordError(
            f"name is {name!r}; it must be an identifier without 'flash', from which transformers reads other things."
        )
    taken = AttentionInterface().get(name)
    if name == "eager" or not (taken is None or isinstance(taken, RingAttention)):
        raise KeywordError(f"name is {name!r}, which is another attention of transformers. Choose one of your own.")
    attention = RingAttention(ring, ring_size, layout, kernels)
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention.mask)
    return attention


@dataclass(frozen=True, eq=False)
class RingAttention:
    """What `register` registers: the settings, and the functions that transformers calls."""

    ring: Any
    ring_size: int | None
    layout: str | Layout
    kernels: Kernels | str | None

    def mask(
        self, *, kv_length: int, mask_function: Any, q_offset: int = 0, kv_offset: int = 0,
        attention_mask: torch.Tensor | None = None, **form: Any,
    ) -> ModelMask:  # fmt: skip
        """What the model's mask lets a query see; transformers calls it once for each kind of mask in a forward pass.

        form: how other attentions want their mask written; there is no matrix here.
        Raises UnsupportedError for masks that ring attention lacks; a past is for attention to judge.
        """
        columns = range(int(kv_offset), int(kv_offset) + kv_length)
        return replace(read_mask(mask_function), padding=attention_mask, first=int(q_offset), columns=columns)

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: Any, dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
        sliding_window: int | None = None, softcap: float | None = None, position_ids: torch.Tensor | None = None,
        s_aux: torch.Tensor | None = None, cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None, **keywords: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """Attention of one layer: query [B, H, S, D], key and value [B, Hk, S, D] give ([B, S, H, D], None).

        With a `RingCache` key and value are what its ``update`` gave, and query is the same on every rank.

        s_aux: the layer's sinks [H]. cu_seq_lens_q, cu_seq_lens_k: where packed documents begin and end in the whole
            sequence, the same on every rank.

        Raises the errors of `ringcore.ring_attention`, and UnsupportedError, by name, for what it lacks.
        """
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        # Without a mask the model leaves it to attention: the reading of transformers' own attention functions.
        mask = ModelMask(is_causal) if attention_mask is None else attention_mask

        ends = cu_seq_lens_q, cu_seq_lens_k

        def check() -> None:
            check_dropout(dropout)
            check_keywords(keywords)
            _check_mask(mask, is_causal, sliding_window)
            if isinstance(key, NewKeys):
                check_cached(key, query, mask, s_aux, documents=any(x is not None for x in ends))
                return
            _check_past(mask, query, key)
            if self.ring is not None:
                _check_split(module, attention_mask)
                _check_temperature(module)

        if isinstance(key, NewKeys):
            out = attend_to_cache(
                key, query, mask, check, ring=self.ring, ring_size=self.ring_size, kernels=self.kernels, scale=scaling,
                softcap=softcap, sinks=s_aux,
            )  # fmt: skip
            return out.transpose(1, 2).contiguous(), None
        settled = settle(self.ring, self.layout, mask, query, position_ids, ends, check)
        out = ring_attention(
            query, key, value, ring=self.ring, ring_size=self.ring_size, causal=mask.causal, window=mask.window,
            scale=scaling, softcap=softcap, sinks=s_aux, key_lengths=settled.key_lengths, documents=settled.documents,
            layout=self.layout, kernels=self.kernels,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


def _check_past(mask: ModelMask, query: torch.Tensor, key: torch.Tensor) -> None:
    """That there is none: all queries and keys are of this forward pass."""
    rows, columns = query.shape[2], range(key.shape[2]) if mask.columns is None else mask.columns
    # Padding of another length than the mask's is told later.
    past = mask.first or columns.start or (mask.padding is None and len(columns) != rows)
    if past or key.shape[2] != rows or any(settled.left is not None for settled in mask.settled):
        raise UnsupportedError(
            f"attention has {rows} queries from {mask.first} on, {key.shape[2]} keys on this rank, and a mask of "
            f"{len(columns)} keys from {columns.start} on: a KV cache with a past, or attention to another sequence. "
            "Ring attention under transformers lacks both, but for a cache of its own: generate with "
            "past_key_values=ringcore_transformers.RingCache(), or pass use_cache=False."
        )


def _check_temperature(module: torch.nn.Module) -> None:
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        raise UnsupportedError(
            f"{type(module).__name__} scales queries by their places on this rank, not in the whole sequence. Set "
            "attn_temperature_tuning to False in the model's config, which changes nothing up to floor_scale tokens."
        )


def _check_mask(mask: Any, is_causal: bool, sliding_window: int | None) -> None:
    if not isinstance(mask, ModelMask):
        kind = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        raise UnsupportedError(
            f"attention got a ready-made attention_mask of {kind}; ring attention takes padding alone, as a model's "
            "attention_mask [B, S] of ones and zeros. Pass that, or no mask."
        )
    if mask.causal != is_causal:
        raise KeywordError(
            f"the model's mask is {'' if mask.causal else 'not '}causal, but its attention says is_causal={is_causal}. "
            "Set is_causal in the model's config alone."
        )
    if sliding_window is None:
        return
    due = (sliding_window - 1, None if mask.causal else sliding_window - 1)
    if mask.window != due:
        raise KeywordError(
            f"attention got sliding_window={sliding_window}, which is the window {due}, but the model's mask has the "
            f"window {mask.window}. Which one is meant cannot be told."
        )


def _check_split(module: torch.nn.Module, attention_mask: Any) -> None:
    """That the sequence is split over the ring's processes as far as can be told, and that all layers know of it."""
    if attention_mask is None:
        raise UnsupportedError(
            f"{type(module).__name__} asks for attention without the mask that transformers makes for texts, as parts "
            "of a model do that look at images: on a ring of processes their sequence is not split. Give such parts an "
            'attention of their own, attn_implementation={"": "ringcore", "vision_config": "sdpa"} for example.'
        )
    # Layers that mix positions in any other way would see this rank's shard alone, and nobody would notice.
    kinds = set(getattr(getattr(module, "config", None), "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds:
        raise UnsupportedError(
            f"the model has layers of kind {', '.join(sorted(kinds))}, which would see only this rank's part of the "
            f"sequence. On a ring of processes all layers must be {' or '.join(sorted(ATTENTION_LAYERS))}."
        )
