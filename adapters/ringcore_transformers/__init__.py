"""Hugging Face transformers: ring attention under a name of its own, batches split over the ring, and the loss."""

from ringcore_transformers.attention import RingAttention, register
from ringcore_transformers.batch import split_batch
from ringcore_transformers.sums import loss, sum_gradients

__all__ = ["RingAttention", "loss", "register", "split_batch", "sum_gradients"]
