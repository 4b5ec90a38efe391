"""One GPU: CuPy's partials and tiled kernels, their time on the device and on the host.

    python tests/benchmarks/cupy_gpu.py [--rows 4096 16384] [--heads 16] [--width 128]

Device: queued calls, divided by their number. Host: the median time until a call returns, on an idle device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial as bound

import cupy
import ml_dtypes
import numpy as np

from ringcore import Array, Band, Gradients, Partial, Score, Tile
from ringcore_cupy import Tiled, partials

CALLS = 5
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
EVERY = slice(None), slice(None), slice(None), ...


def measured(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds on the device, microseconds on the host."""
    wait = cupy.cuda.runtime.deviceSynchronize
    call()
    wait()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    wait()
    device = (time.perf_counter() - start) / CALLS * 1e3
    host = []
    for _ in range(CALLS * 4):
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        wait()
    return device, statistics.median(host) * 1e6


def show(about: str, work: float, unit: str, call: Callable[[], object]) -> None:
    """work: what a call does, in 10^9 of the unit."""
    device, host = measured(call)
    print(f"{about}: {device:.3f} ms, {work / device * 1e3:.0f} {unit}/s, host {host:.0f} us", flush=True)


def show_partials(rows: int, heads: int, width: int, name: str) -> None:
    shape, dtype = (1, heads, rows, width), np.dtype(DTYPES[name])
    giga, size = heads * rows * width / 1e9, dtype.itemsize
    maximum, total = cupy.zeros(shape[:3], dtype=np.float32), cupy.ones(shape[:3], dtype=np.float32)
    one = cupy.broadcast_to(cupy.ones((), dtype=np.float32), shape[:3])
    wide = Partial(cupy.ones(shape, dtype=np.float32), maximum, total)
    part = Partial(wide.weighted.astype(dtype), maximum, total)
    done, other = (Partial(wide.weighted.astype(dtype), maximum + 0, one) for _ in range(2))
    about = f"{rows} rows {name}"
    show(f"{about} merge", giga * (8 + size), "GB", bound(partials.merge_rows, wide, EVERY, part))
    show(f"{about} divide", giga * (4 + size), "GB", bound(partials.finished, wide, dtype))
    show(f"{about} finish in place", giga * 3 * size, "GB", bound(partials.finished, done, dtype, (EVERY, other)))
    show(f"{about} lse", giga * 12 / width, "GB", bound(partials.finished_lse, maximum, total, 0.0))


def show_tiles(rows: int, heads: int, width: int, name: str) -> None:
    every, positions, dtype = slice(None), (range(rows),), np.dtype(DTYPES[name])
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> Array:
        return cupy.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)

    q, k, v, dout = (draw(1, heads, rows, width) for _ in range(4))
    bias = draw(1, heads, 1, rows)
    for term, band, softcap, more in (
        ("full", Band(), None, {}),
        ("causal", Band(None, 0), None, {}),
        ("bias", Band(), None, {"bias": bias}),
        ("softcap", Band(), 20.0, {}),
    ):
        kernels, tile = Tiled(), Tile(every, every, every, every, every, positions, positions, band)
        asked = {"score": Score(width**-0.5, softcap), "tile": tile, **more}
        part = kernels.forward(q, k, v, **asked)
        delta = cupy.sum(part.out * dout.astype(np.float32), axis=-1)
        given = dout, q, k, v, part.maximum, part.total, delta
        into = Gradients(*(cupy.zeros(x.shape, dtype=np.float32) for x in (q, k, v)))
        giga = 4 * heads * rows * rows * width / (2 if term == "causal" else 1) / 1e9
        about = f"{rows} rows {name} {term}"
        show(f"{about} forward", giga, "GFLOP", bound(kernels.forward, q, k, v, **asked))
        show(f"{about} backward", 2.5 * giga, "GFLOP", bound(kernels.backward, *given, into=into, **asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    for rows in options.rows:
        for name in DTYPES:
            show_partials(rows, options.heads, options.width, name)
            show_tiles(rows, options.heads, options.width, name)


if __name__ == "__main__":
    main()
