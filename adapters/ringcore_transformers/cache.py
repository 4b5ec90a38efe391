"""The KV cache of `generate` whose positions are dealt to the ranks of a ring."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache

from ringcore import UnsupportedError
from ringcore_transformers.cache_layer import RingCacheLayer


class RingCache(Cache):  # type: ignore[misc]  # transformers' classes have no types
    """A KV cache for ``model.generate(..., past_key_values=RingCache())`` with attention that `register` registered.

    Every rank generates the same tokens and runs the whole model on them; of the keys and values of each layer it keeps
    those of its own positions. They are dealt like cards: position p belongs to rank p modulo the number of ranks,
    whatever layout is registered, so that the cache grows evenly. The ring is the one that attention was registered
    with; without one all positions are here.

    All lengths that it reports are those of the whole sequence, over all ranks. Beams, rolling back after assisted
    decoding, and generating on from what an earlier call left are those of transformers' DynamicCache. A layer with a
    window drops positions that no later token can see.

    Raises UnsupportedError, by name, for states that are not keys and values: of convolutions, of recurrences, and of
    indexers of sparse attention.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._recording = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **keywords: Any
    ) -> tuple[Any, Any]:
        """New keys [B, Hk, S, D] and values [B, Hk, S, E] of a layer: give attention what this returns."""
        while len(self.layers) <= layer_idx:
            layer = RingCacheLayer()
            layer.record_past = self._recording
            self.layers.append(layer)
        updated: tuple[Any, Any] = self.layers[layer_idx].update(key_states, value_states)
        return updated

    def activate_past_recording(self) -> None:
        """Keep what a window would drop until `crop` says that it is not needed; assisted decoding asks for it."""
        self._recording = True  # layers may come later
        for layer in self.layers:
            layer.record_past = True

    def update_conv_state(self, *args: Any, **keywords: Any) -> NoReturn:
        """Refused: the state of a convolution."""
        _refuse("convolutions")

    def update_recurrent_state(self, *args: Any, **keywords: Any) -> NoReturn:
        """Refused: the state of a recurrence."""
        _refuse("linear attention or state spaces")

    def update_indexer(self, *args: Any, **keywords: Any) -> NoReturn:
        """Refused: keys of an indexer."""
        _refuse("indexers of sparse attention")

    def has_previous_state(self, *args: Any, **keywords: Any) -> NoReturn:
        """Refused: only layers that mix positions in another way than by attention ask."""
        _refuse("convolutions, linear attention or state spaces")


def _refuse(kind: str) -> NoReturn:
    raise UnsupportedError(
        f"the model has layers with {kind}, whose state a RingCache lacks: it holds keys and values alone. Generate "
        "with transformers' own cache and another attn_implementation."
    )
