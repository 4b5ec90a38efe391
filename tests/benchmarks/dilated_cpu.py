"""Dilated attention against dense causal attention on the CPU: does the time fall as the work does?

    python -P tests/benchmarks/dilated_cpu.py [--json FILE] [--length 65536] [--linear]

Branches as LongNet's: segments of 2,048 to 32,768 positions, rates of 1 to 16; float32, 4 heads of 64, causal, random
data, NumPy and Torch arrays. "share" is the speed-up over dense causal attention, over the ratio of visible pairs:
1 would be the dense kernel's own rate. ``--linear``: NumPy with one branch more for each doubling of the length, from
8k to 1M positions, 1 head of 16; the time for each position. Of every length 64 rows are first compared with dense
attention in float64, whose scores have the logarithm of how often a pair counts added.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ringcore

SEGMENT = 2048
Branches = dict[str, list[int]]


def branches(longest: int) -> Branches:
    """Segments from 2,048 positions to ``longest``, each twice as long and as sparse as the one before."""
    count = (longest // SEGMENT).bit_length()
    return {
        "segment_lengths": [SEGMENT << n for n in range(count)],
        "dilation_rates": [1 << n for n in range(count)],
    }


def pairs(length: int, given: Branches) -> int:
    """Visible pairs of all branches, causal, for one head, where lengths divide."""
    found = 0
    for w, r in zip(given["segment_lengths"], given["dilation_rates"], strict=True):
        rows = w // r
        found += length // w * (rows * (rows + 1) // 2)
    return found


def check(out: Any, arrays: list[Any], given: Branches) -> float:
    """The largest error of 64 rows; raises ValueError if it is no rounding."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in arrays)
    heads, length = q.shape[1:3]
    worst, j = 0.0, np.arange(length)
    for i in np.random.default_rng(1).integers(0, length, 64):
        for head in range(heads):
            times = sum(
                ((i // w == j // w) & ((i % w) % r == head % r) & ((j % w) % r == head % r) & (j <= i)).astype(int)
                for w, r in zip(given["segment_lengths"], given["dilation_rates"], strict=True)
            )
            scores = k[0, head] @ q[0, head, i] / np.sqrt(q.shape[3])
            power = times * np.exp(scores - scores.max())
            due = power @ v[0, head] / power.sum()
            worst = max(worst, float(np.abs(np.asarray(out)[0, head, i] - due).max()))
    if not worst < 1e-5:
        raise ValueError(f"rows are off by {worst}")
    return worst


def draw(heads: int, length: int, width: int) -> list[Any]:
    """q, k and v, in float32."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, heads, length, width), dtype=np.float32) for _ in range(3)]


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def against_dense(length: int, rounds: int) -> list[dict[str, Any]]:
    """Medians of both sides, which take turns, for each library."""
    given, arrays = branches(min(length, 32768)), draw(4, length, 64)
    lines = []
    for name, made in (("numpy", arrays), ("torch", [torch.from_numpy(x) for x in arrays])):
        sides: dict[str, Callable[[], Any]] = {
            "dilated": lambda made=made: ringcore.dilated_attention(*made, **given, causal=True),
            "dense": lambda made=made: ringcore.ring_attention(*made, causal=True),
        }
        error = check(sides["dilated"](), arrays, given)
        seconds = {side: statistics.median(found) for side, found in in_turns(sides, rounds).items()}
        work = length * (length + 1) / 2 / pairs(length, given)
        lines.append({
            "library": name, "length": length, "seconds": seconds, "pairs_ratio": work,
            "speed_up": seconds["dense"] / seconds["dilated"],
            "share": seconds["dense"] / seconds["dilated"] / work, "error": error,
        })  # fmt: skip
        print(lines[-1], flush=True)
    return lines


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The times of each side."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            found[side].append(timed(call))
    return found


def linear(rounds: int) -> list[dict[str, Any]]:
    """The time for each position, for lengths that double."""
    lines = []
    for shift in range(13, 21):
        length, given = 1 << shift, branches(1 << shift)
        arrays = draw(1, length, 16)

        def call(arrays: list[Any] = arrays, given: Branches = given) -> Any:
            return ringcore.dilated_attention(*arrays, **given, causal=True)

        error = check(call(), arrays, given)
        seconds = statistics.median(timed(call) for _ in range(rounds))
        lines.append({
            "length": length, "branches": len(given["dilation_rates"]), "seconds": seconds,
            "microseconds_per_position": seconds / length * 1e6, "pairs_per_position": pairs(length, given) / length,
            "error": error,
        })  # fmt: skip
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--linear", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {"against_dense": against_dense(options.length, options.rounds)}
    if options.linear:
        results["linear"] = linear(options.rounds)
    if options.json:
        command = " ".join(Path(word).name for word in sys.argv)
        found = {"command": command, "numpy": np.__version__, "torch": torch.__version__, "results": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
