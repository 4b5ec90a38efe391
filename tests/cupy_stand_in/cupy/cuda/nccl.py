"""NCCL, which needs GPUs: the tests of rings bring their own."""

from __future__ import annotations

available = False
