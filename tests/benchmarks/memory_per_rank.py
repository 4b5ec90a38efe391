"""Peak memory of each rank of an MPI ring, against what the rank must hold.

    mpiexec -n P python tests/benchmarks/memory_per_rank.py [--length N] [--backward] [--json FILE]

Measured is the proportional set size, in which a page that several ranks share counts in equal parts, sampled throughout
the call, above what the process took once everything was imported and the ring made. Due is: this rank's inputs and
outputs, two visiting blocks, and the workspace: 8 MiB per thread and three numbers per query. Reported is the rank
with the largest ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from mpi4py import MPI

import ringcore
from ringcore_mpi import adapt

WORLD = MPI.COMM_WORLD
MEBI = 2**20
SCRATCH = 8 * MEBI  # of the NumPy kernels, for each thread


def proportional_set_size() -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024


class Peak:
    """The largest proportional set size while the context is open."""

    def __enter__(self) -> Peak:
        self.bytes, self._open = 0, True
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _sample(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, proportional_set_size())
            time.sleep(0.02)


def measure(length: int, heads: int, width: int, layout: str, backward: bool) -> dict[str, Any]:
    """One causal call on random shards; sizes in MiB."""
    ring = adapt(WORLD)
    WORLD.Barrier()
    before = proportional_set_size()
    WORLD.Barrier()
    rows = ringcore.resolve_layout(layout, length, WORLD.size).lengths[WORLD.rank]
    rng = np.random.default_rng(WORLD.rank)
    with Peak() as peak:
        # dtype given to the generator: a float64 draw that is cast would be counted as ours.
        q, k, v = (rng.standard_normal((1, heads, rows, width), dtype="float32") for _ in range(3))
        start = time.perf_counter()
        if backward:
            dout = rng.standard_normal(q.shape, dtype="float32")
            (out, _), pullback = ringcore.ring_attention_vjp(q, k, v, ring=ring, layout=layout, causal=True)
            held = (q, k, v, out, dout, *pullback(dout))
        else:
            held = (q, k, v, ringcore.ring_attention(q, k, v, ring=ring, layout=layout, causal=True))
        seconds = time.perf_counter() - start
    visiting = (k, v, *held[6:]) if backward else (k, v)
    due = sum(x.nbytes for x in held) + 2 * sum(x.nbytes for x in visiting) + SCRATCH + 3 * 4 * heads * rows
    taken = peak.bytes - before
    found = WORLD.gather((taken / due, taken / MEBI, due / MEBI))
    if WORLD.rank > 0:
        return {}
    ratio, most, allowed = max(found)
    return {
        "ranks": WORLD.size, "length": length, "heads": heads, "width": width, "backward": backward, "layout": layout,
        "peak_mib": round(most, 1), "due_mib": round(allowed, 1), "ratio": round(ratio, 3), "seconds": round(seconds, 1),
        "ring": ring.explain,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the measurement, one JSON object a line")
    chosen = parser.parse_args()
    found = measure(chosen.length, chosen.heads, chosen.width, chosen.layout, chosen.backward)
    if WORLD.rank == 0:
        print(json.dumps(found, indent=2), flush=True)
        if chosen.json:
            with chosen.json.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
