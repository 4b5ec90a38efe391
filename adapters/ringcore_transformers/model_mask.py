"""What a model's mask lets a query see, read from the function by which transformers describes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import masking_utils

from ringcore import Documents, UnsupportedError

Window = tuple[int | None, int | None]


class MaskReadError(UnsupportedError, AttributeError):
    """A model looked into its mask, as if it were a matrix."""


@dataclass(frozen=True)
class Settled:
    """What the ranks agreed on for a forward pass: the keys of each batch entry, and packed documents; None is all.

    Chunks are documents too. left: over a RingCache, and only there, the padding on the left of each batch entry.
    """

    key_lengths: tuple[int, ...] | None
    documents: Documents | None
    left: tuple[int, ...] | None = None


@dataclass
class ModelMask:
    """The mask of one forward pass, which a model hands from layer to layer without looking into it.

    causal, window: as in `ringcore.ring_attention`. packed: whether transformers took jumps of the position ids for
    borders of documents. chunk: of how many positions those are that see each other and nothing before; None is all.
    padding: [B, columns], True for a token, False for padding, or None. first, columns: of which places in a KV cache
    the first query and the keys are, as transformers counts them; None if it did not say. settled: what the ranks
    agreed on; found by the first layer, read by the others.
    """

    causal: bool
    window: Window = (None, None)
    packed: bool = False
    chunk: int | None = None
    padding: torch.Tensor | None = None
    first: int = 0
    columns: range | None = None
    settled: list[Settled] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        raise MaskReadError(
            f"the model reads {name!r} of its attention mask, but ring attention writes no mask out. Use another "
            "attn_implementation for this model."
        )

    def narrowed(self, window: Window) -> ModelMask:
        """This mask and a window: both must let a key through."""
        left, right = (_smaller(mine, other) for mine, other in zip(self.window, window, strict=True))
        return ModelMask(self.causal, (left, right), self.packed, self.chunk)


def read_mask(function: Callable[..., Any]) -> ModelMask:
    """The mask that a mask function of transformers describes.

    Raises UnsupportedError for a function that is not made of those known here: nothing is guessed.
    """
    mask = ModelMask(causal=False)
    for part in _parts(function):
        made_by = _maker(part)
        if made_by == "causal_mask_function":
            mask.causal = True
        elif made_by == "sliding_window_overlay":
            mask = mask.narrowed((_captured(part, "sliding_window") - 1, None))
        elif made_by == "sliding_window_bidirectional_overlay":
            mask = mask.narrowed((_captured(part, "sliding_window"),) * 2)
        elif made_by == "chunked_overlay":  # counted from the first token: padding on the left is refused
            mask.chunk = _captured(part, "chunk_size")
        elif made_by == "packed_sequence_mask_function":
            mask.packed = True
        elif made_by != "bidirectional_mask_function":
            raise UnsupportedError(
                f"the model's mask is made by {part.__module__}.{part.__qualname__}, which ring attention lacks; it "
                "has causal and bidirectional masks, sliding windows, chunks and padding on the right. Use another "
                "attn_implementation for this model."
            )
    return mask


def _parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions of which all must let a key through."""
    if _maker(function) != "and_masks":
        return [function]
    return [part for inner in _captured(function, "mask_functions") for part in _parts(inner)]


def _maker(function: Callable[..., Any]) -> str | None:
    """The name of the function of transformers that this is, or that returned it; None for any other function."""
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    return function.__qualname__.partition(".")[0]


def _captured(function: Callable[..., Any], name: str) -> Any:
    """What the function was made with."""
    return inspect.getclosurevars(function).nonlocals[name]


def _smaller(first: int | None, second: int | None) -> int | None:
    return min((x for x in (first, second) if x is not None), default=None)
