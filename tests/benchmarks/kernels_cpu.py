"""The NumPy kernels against torch's scaled_dot_product_attention, on the CPU.

    python -P tests/benchmarks/kernels_cpu.py [--quick] [--json FILE]

Both sides run in turn, in an order that alternates; each ratio is that of one pair of neighbours, and the median is
reported: above 1, ringcore is faster. Every timed result is compared with torch's, in buffers that were poisoned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringcore import Band, Gradients, Partial, Score, Tile
from ringcore_numpy import NumpyKernels


@dataclass(frozen=True)
class Setting:
    length: int
    heads: int
    k_heads: int
    depth: int
    causal: bool
    dtype: str


@dataclass(frozen=True)
class Line:
    """One measurement; speed is the median over rounds of torch's time over ringcore's."""

    direction: str
    setting: Setting
    threads: int
    speed: float
    slowest: float
    fastest: float
    ringcore_ms: float
    torch_ms: float
    error: float
    rounds: int


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{names[0] if names else 'unknown'}{', AVX-512' if 'avx512f' in flags else ''}"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    time.sleep(0.02)  # OpenMP's threads spin for a while after torch's calls, on the cores of the next side
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def pair(first_ours: bool, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, Any, float, Any]:
    if first_ours:
        t, got = timed(ours)
        u, want = timed(theirs)
    else:
        u, want = timed(theirs)
        t, got = timed(ours)
    return t, got, u, want


def error_of(got: np.ndarray, want: torch.Tensor) -> float:
    """The largest difference over the largest number; NaN in either is inf."""
    want_array = want.detach().numpy()
    difference = float(np.max(np.abs(got - want_array)) / np.max(np.abs(want_array)))
    return difference if np.isfinite(difference) else float("inf")


def line(direction: str, setting: Setting, threads: int, times: list[tuple[float, float]], error: float) -> Line:
    tolerance = 1e-4 if setting.dtype == "float32" else 1e-10
    if error > tolerance:
        sys.exit(f"{direction} {setting}: differs from torch by {error:.1e}, more than {tolerance:.0e}")
    ratios = [theirs / ours for ours, theirs in times]
    ms = [1e3 * statistics.median(side) for side in zip(*times, strict=True)]
    return Line(
        direction, setting, threads, statistics.median(ratios), min(ratios), max(ratios), *ms, error, len(times)
    )


def measure(setting: Setting, threads: int, rounds: int) -> list[Line]:
    rng = np.random.default_rng(0)
    shape = (1, setting.heads, setting.length, setting.depth)
    k_shape = (1, setting.k_heads, setting.length, setting.depth)
    q, k, v, dout = (rng.standard_normal(s).astype(setting.dtype) for s in (shape, k_shape, k_shape, shape))
    tq, tk, tv = (torch.from_numpy(x).requires_grad_(True) for x in (q, k, v))
    tdout = torch.from_numpy(dout)
    kernels = NumpyKernels(threads)
    score = Score(setting.depth**-0.5)
    every, positions = slice(None), (range(setting.length),)
    band = Band(None, 0 if setting.causal else None)
    tile = Tile(every, every, every, every, every, positions, positions, band)

    def theirs() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            tq, tk, tv, is_causal=setting.causal, enable_gqa=setting.heads != setting.k_heads
        )

    def theirs_alone() -> torch.Tensor:
        with torch.no_grad():
            return theirs()

    forward: list[tuple[float, float]] = []
    backward: list[tuple[float, float]] = []
    forward_error = backward_error = 0.0
    partial = Partial(np.empty(shape, q.dtype), np.empty(shape[:3], q.dtype), np.empty(shape[:3], q.dtype))
    into = Gradients(np.empty_like(q), np.empty_like(k), np.empty_like(v))

    def ours() -> np.ndarray:
        return kernels.forward(q, k, v, score=score, tile=tile, state=partial).out

    for number in range(rounds + 1):  # the first only warms up
        partial.weighted.fill(np.nan)  # an empty state, with a poisoned payload that must not be read
        partial.total.fill(np.nan)
        partial.maximum.fill(-np.inf)
        t, out, u, want = pair(number % 2 == 0, ours, theirs_alone)
        forward_error = max(forward_error, error_of(out, want))
        delta = (dout * out).sum(-1)
        graph = theirs()

        def our_gradient(delta: np.ndarray = delta) -> Gradients:
            for x in (into.dq, into.dk, into.dv):
                x.fill(0)  # in the timed part: torch's gradients are new arrays, too
            return kernels.backward(
                dout, q, k, v, partial.maximum, partial.total, delta, score=score, tile=tile, into=into
            )

        def their_gradient(graph: torch.Tensor = graph) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(graph, (tq, tk, tv), tdout)

        for x in (into.dq, into.dk, into.dv):
            x.fill(np.nan)
        t2, got, u2, wanted = pair(number % 2 == 0, our_gradient, their_gradient)
        errors = [error_of(x, y) for x, y in zip((got.dq, got.dk, got.dv), wanted, strict=True)]
        backward_error = max(backward_error, *errors)
        if number:
            forward.append((t, u))
            backward.append((t2, u2))
    return [
        line("forward", setting, threads, forward, forward_error),
        line("backward", setting, threads, backward, backward_error),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short length and few rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements there")
    parser.add_argument("--threads", type=int, default=2, help="threads of either side (default 2)")
    parser.add_argument("--rounds", type=int, help="pairs of calls per measurement")
    parser.add_argument("--lengths", type=int, nargs="+", help="sequence lengths (default 4096 8192)")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    lengths = chosen.lengths or ([512] if chosen.quick else [4096, 8192])
    rounds = chosen.rounds or (3 if chosen.quick else 9)
    settings = [Setting(n, 8, 8, 64, causal, "float32") for n in lengths for causal in (False, True)]
    if not chosen.quick:
        settings += [Setting(lengths[0], 8, 8, 128, causal, "float32") for causal in (False, True)]
        settings += [Setting(lengths[0], 8, 2, 64, True, "float32"), Setting(lengths[0], 1, 1, 64, True, "float32")]
    print(f"{processor()}; {chosen.threads} threads; numpy {np.__version__}, torch {torch.__version__}")
    print("speed is torch's time over ringcore's: above 1, ringcore is faster\n")
    print(f"{'':9}{'length':>7}{'heads':>7}{'depth':>6}{'':8}{'speed':>6}   {'range':12}{'ms':>8}{'torch':>8}  error")
    results = []
    for setting in settings:
        for x in measure(setting, chosen.threads, rounds):
            results.append(asdict(x))
            print(
                f"{x.direction:9}{setting.length:7}{f'{setting.heads}/{setting.k_heads}':>7}{setting.depth:6}"
                f"{' causal' if setting.causal else ' full':8}{x.speed:6.2f}   {f'{x.slowest:.2f}-{x.fastest:.2f}':12}"
                f"{x.ringcore_ms:8.1f}{x.torch_ms:8.1f}  {x.error:.0e}",
                flush=True,
            )
    if chosen.json:
        variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OPENBLAS_", "OMP_"))}
        head = {"cpu": processor(), "numpy": np.__version__, "torch": torch.__version__, "environment": variables}
        chosen.json.write_text(json.dumps({**head, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
