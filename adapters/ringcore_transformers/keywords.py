"""Keywords that models hand to their attention beside q, k and v: known to be harmless, refused, or unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringcore import UnsupportedError

# What each does elsewhere, so that attention need not look at it.
HARMLESS = {
    "use_cache": "a first pass fills a cache with this rank's keys; a past in any but a RingCache is refused",
    "output_hidden_states": "hidden states are collected outside of attention",
    "num_items_in_batch": "the loss divides by it",
    "shift_labels": "the loss compares logits with them",
    "max_length_q": "it follows from cu_seq_lens_q",
    "max_length_k": "it follows from cu_seq_lens_k",
}

# What each asks for.
REFUSED = {
    "output_attentions": "attention weights, which no rank ever holds whole",
    "head_mask": "a head mask",
    "position_bias": "a bias by relative position",
    "cu_seqlens": "packed documents in another way than by cu_seq_lens_q and cu_seq_lens_k",
    "seq_idx": "packed documents in another way than by cu_seq_lens_q and cu_seq_lens_k",
    "past_key_values": "a KV cache",
    "cache_position": "a KV cache",
    "block_indices": "sparse attention",
    "indices": "sparse attention",
}


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a keyword that asks for something, unless it is known to be harmless."""
    for name, value in keywords.items():
        if name in HARMLESS or value is None or value is False:
            continue
        asked = REFUSED.get(name, "something unknown here")
        raise UnsupportedError(
            f"the model's attention was called with {name}, which asks for {asked}: ring attention lacks that. "
            "Switch it off, or use another attn_implementation."
        )


def check_dropout(dropout: float) -> None:
    """Raise UnsupportedError for a rate other than 0."""
    if dropout:
        raise UnsupportedError(
            f"the model trains with an attention dropout of {dropout}. Ring attention wants a seed for that, the same "
            "on every rank and another one for each call, which transformers does not give. Set that rate to 0 in the "
            "config (attention_dropout, attention_probs_dropout_prob or attn_pdrop), or call model.eval()."
        )
