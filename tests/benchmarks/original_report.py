"""The report that ringcore began with, claim by claim: what it said, and what its own algorithm gives.

    python tests/benchmarks/original_report.py

Needs NumPy alone: the report's inputs, `torch.manual_seed(42)` on a CUDA device, are drawn by philox.py.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ringcore

sys.path.append(str(Path(__file__).parent.parent))

from philox import standard_normal

SHAPE = (1, 512, 2, 32)  # [B, S, H, D]
SIZES = (1, 2, 4, 8)


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention in float64, by the definition."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def as_reported(q: np.ndarray, k: np.ndarray, v: np.ndarray, size: int) -> np.ndarray:
    """Each chunk of keys softmaxed on its own, and the results added up."""
    out = np.zeros(q.shape)
    for keys, values in zip(np.split(k, size, axis=1), np.split(v, size, axis=1), strict=True):
        out += dense(q, keys, values)
    return out


def peak(call: Callable[[], object]) -> float:
    """Mebibytes that a call had at once, at most."""
    tracemalloc.start()
    call()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found / 2**20


def main() -> None:
    """Print what stands in docs/explanation/original-report.md."""
    q, k, v = (standard_normal(42, SHAPE, call) for call in range(3))
    due = dense(q, k, v)
    ones = np.ones_like(v)
    print(f"dense attention: out sums to {due.sum():.4f}")
    print()
    print("softmax per chunk, summed over chunks")
    for size in SIZES:
        wrong = as_reported(q, k, v, size)
        weights = as_reported(q, k, ones, size)
        ratio = (wrong * due).sum() / (due * due).sum()
        rest = np.abs(wrong - size * due).max()
        print(
            f"ring of {size}: weights of a row sum to {weights.min():.6f} to {weights.max():.6f}; "
            f"out sums to {wrong.sum():.4f}, off by up to {np.abs(wrong - due).max():.4f}; "
            f"nearest multiple of dense {ratio:.4f}, off from {size} times dense by up to {rest:.4f}"
        )
    print()
    print("ringcore, float32")
    for size in SIZES:
        out = ringcore.ring_attention(q, k, v, ring_size=size, axes="bshd")
        error = np.abs(out - due).max()
        print(f"ring of {size}: out sums to {out.sum(dtype=np.float64):.2f}, within 1e-6 of dense: {error < 1e-6}")
    print()
    print("peak memory of the algorithm as reported, whole q against one chunk at a time")
    sizes = np.array(SIZES)
    found = np.array([peak(lambda size=size: as_reported(q, k, v, size)) for size in SIZES])
    slope, base = np.polyfit(1 / sizes, found, 1)
    for size, each in zip(SIZES, found, strict=True):
        print(f"ring of {size}: {each:.1f} MiB, {base:.1f} + {slope:.1f} / {size} is {base + slope / size:.1f}")


if __name__ == "__main__":
    main()
