"""Hugging Face transformers: ring attention under a name of its own, split batches, the loss, and a KV cache."""

from ringcore_transformers.attention import RingAttention, register
from ringcore_transformers.batch import split_batch
from ringcore_transformers.cache import RingCache
from ringcore_transformers.sums import loss, sum_gradients

__all__ = ["RingAttention", "RingCache", "loss", "register", "split_batch", "sum_gradients"]
