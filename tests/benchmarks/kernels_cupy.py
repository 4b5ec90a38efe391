"""One GPU: ring_attention on CuPy arrays against cuDNN called directly, forward and backward; and the host's share.

    python tests/benchmarks/kernels_cupy.py [--json FILE] [--sizes 16384 ...]

float16 and bfloat16, 16 heads of 128, causal, random data. Each figure is the time between two CUDA events around 20
queued calls, divided by 20; sides take turns, and the median over the rounds is reported. cuDNN's graphs are built once
and run on memory that was made before. The host's time is that of giving the kernels one tile, the GPU idle before.
Outputs are poisoned and compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cudnn
import cupy
import ml_dtypes

import ringcore
from ringcore.discovery import choose_kernels

HEADS, WIDTH, CALLS = 16, 128, 20
KERNELS = "cupy.cuda.cudnn"
DTYPES = {"float16": (cupy.float16, "HALF"), "bfloat16": (cupy.dtype(ml_dtypes.bfloat16), "BFLOAT16")}
NAMES = ("out", "dq", "dk", "dv")

Array = Any
Call = Callable[[], Any]


class Direct:
    """cuDNN's own graphs for causal attention [1, H, S, D] and its gradients, on memory of their own."""

    def __init__(self, q: Array, k: Array, v: Array, dout: Array, kind: str) -> None:
        self.handle = cudnn.create_handle()
        self.out, self.dq, self.dk, self.dv = (cupy.empty_like(q) for _ in range(4))
        for x in (self.out, self.dq, self.dk, self.dv):
            x.view(cupy.uint16)[...] = 0x7FFF  # NaN in both half types
        self.lse = cupy.full((*q.shape[:3], 1), cupy.nan, dtype=cupy.float32)
        given = {"q": q, "k": k, "v": v, "out": self.out, "lse": self.lse, "dout": dout}
        self.forward = self._built(kind, {name: given[name] for name in "qkv"}, self._attend)
        self.backward = self._built(kind, given, self._pull_back)

    def _built(
        self, kind: str, given: dict[str, Array], make: Callable[[Any, dict[str, Any]], dict[Any, Array]]
    ) -> Call:
        types = cudnn.data_type
        graph = cudnn.pygraph(
            io_data_type=getattr(types, kind), intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT,
            handle=self.handle,
        )  # fmt: skip
        tensors = {
            name: graph.tensor(
                dim=list(x.shape), stride=[step // x.itemsize for step in x.strides], name=name, uid=uid,
                data_type=types.FLOAT if name == "lse" else getattr(types, kind),
            )
            for uid, (name, x) in enumerate(given.items(), 1)
        }  # fmt: skip
        results = make(graph, tensors)
        for uid, (tensor, x) in enumerate(results.items(), len(given) + 1):
            wanted = types.FLOAT if x is self.lse else getattr(types, kind)
            tensor.set_output(True).set_uid(uid).set_dim(list(x.shape)).set_data_type(wanted)
            tensor.set_stride([step // x.itemsize for step in x.strides])
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        addresses = {uid: x.data.ptr for uid, x in enumerate((*given.values(), *results.values()), 1)}
        workspace = cupy.empty(max(1, graph.get_workspace_size()), dtype=cupy.uint8)

        def call() -> Any:
            cudnn.set_stream(self.handle, cupy.cuda.get_current_stream().ptr)
            graph.execute(addresses, workspace.data.ptr, handle=self.handle)
            return list(results.values())

        return call

    def _attend(self, graph: Any, tensors: dict[str, Any]) -> dict[Any, Array]:
        out, lse = graph.sdpa(
            **tensors, attn_scale=WIDTH**-0.5, generate_stats=True, diagonal_band_right_bound=0,
            diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT,
        )  # fmt: skip
        return {out: self.out, lse: self.lse}

    def _pull_back(self, graph: Any, tensors: dict[str, Any]) -> dict[Any, Array]:
        dq, dk, dv = graph.sdpa_backward(
            q=tensors["q"], k=tensors["k"], v=tensors["v"], o=tensors["out"], dO=tensors["dout"], stats=tensors["lse"],
            attn_scale=WIDTH**-0.5, diagonal_band_right_bound=0,
            diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT,
        )  # fmt: skip
        return {dq: self.dq, dk: self.dk, dv: self.dv}


def sides(length: int, dtype: Any, kind: str) -> tuple[dict[str, dict[str, Call]], list[Array]]:
    """For each direction what to time, checked against each other; and q, k, v, dout."""
    generator = cupy.random.default_rng(0)
    q, k, v, dout = (
        generator.standard_normal((1, HEADS, length, WIDTH), dtype=cupy.float32).astype(dtype) for _ in range(4)
    )
    direct = Direct(q, k, v, dout, kind)
    due = [direct.forward()[0], *direct.backward()]
    poison()
    (out, _), pullback = ringcore.ring_attention_vjp(q, k, v, causal=True, kernels=KERNELS)
    check((out, *pullback(dout)), due)
    return {
        "forward": {
            "cuDNN": direct.forward,
            "ringcore": lambda: ringcore.ring_attention(q, k, v, causal=True, kernels=KERNELS),
        },
        "backward": {"cuDNN": direct.backward, "ringcore": lambda: pullback(dout)},
    }, [q, k, v, dout]


def poison() -> None:
    """What CuPy's pool hands out next is full of NaN."""
    blocks = [cupy.full(1 << 24, cupy.nan, dtype=cupy.float32) for _ in range(40)]
    del blocks


def check(came: Any, due: Any) -> None:
    """Raise ValueError unless all are within 0.03 of the largest number due."""
    for name, x, y in zip(NAMES, came, due, strict=True):
        x, y = x.astype(cupy.float32), y.astype(cupy.float32)
        error = float(abs(x - y).max() / abs(y).max())
        if not error < 0.03:
            raise ValueError(f"{name} is off by {error} of its largest number")


def timed(call: Call) -> float:
    """Milliseconds of one of CALLS queued calls."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.get_current_stream().synchronize()
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / CALLS


def host_time(q: Array, k: Array, v: Array, dout: Array) -> dict[str, float]:
    """Microseconds in which the host gives the kernels one tile: short ones, so that the GPU keeps up."""
    from ringcore.values import Band, Gradients, Score, Tile

    rows = 256
    q, k, v, dout = (cupy.ascontiguousarray(x[:, :, :rows]) for x in (q, k, v, dout))
    kernels, _ = choose_kernels(KERNELS, q, v, frozenset({"gradient"}))
    whole, heads = slice(0, rows), slice(0, HEADS)
    tile = Tile(slice(0, 1), heads, heads, whole, whole, (range(rows),), (range(rows),), Band(None, 0))
    score = Score(WIDTH**-0.5)
    part = kernels.forward(q, k, v, score=score, tile=tile)
    calls = {
        "forward": lambda: kernels.forward(q, k, v, score=score, tile=tile),
        "backward": lambda: kernels.backward(
            dout, q, k, v, part.maximum, part.total, None, score=score, tile=tile, into=Gradients(), out=part.weighted,
            lse=part.maximum, dlse=None,
        ),
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        spent = []
        for _ in range(200):
            cupy.cuda.get_current_stream().synchronize()
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
        found[name] = statistics.median(spent) * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384])
    options = parser.parse_args()
    results = []
    for name, (dtype, kind) in DTYPES.items():
        for length in options.sizes:
            found, arrays = sides(length, dtype, kind)
            host = host_time(*arrays)
            for direction, calls in found.items():
                times: dict[str, list[float]] = {side: [] for side in calls}
                for call in calls.values():
                    timed(call)
                for turn in range(options.rounds):
                    for side in list(calls)[:: 1 if turn % 2 else -1]:
                        times[side].append(timed(calls[side]))
                ms = {side: statistics.median(spent) for side, spent in times.items()}
                results.append(
                    {
                        "dtype": name, "length": length, "direction": direction, "ms": ms,
                        "ringcore_over_cudnn": ms["ringcore"] / ms["cuDNN"], "host_us_per_tile": host[direction],
                    }
                )  # fmt: skip
                print(
                    f"{name} {length} {direction}: ringcore {ms['ringcore']:.3f} ms, cuDNN {ms['cuDNN']:.3f} ms, "
                    f"{ms['ringcore'] / ms['cuDNN']:.3f}; the host {host[direction]:.0f} us a tile",
                    flush=True,
                )
    if options.json:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        kept = {
            "gpu": properties["name"].decode(), "cupy": cupy.__version__, "cudnn": cudnn.backend_version(),
            "nvidia-cudnn-frontend": version("nvidia-cudnn-frontend"),
            "command": " ".join(Path(word).name for word in sys.argv), "results": results,
        }  # fmt: skip
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
