"""Hugging Face transformers: ring attention under a name of its own."""

from ringcore_transformers.attention import RingAttention, register

__all__ = ["RingAttention", "register"]
