"""One GPU: ring_attention against the installed fused kernels called directly, forward and backward.

    python -P tests/benchmarks/kernels_gpu.py [--json FILE] [--sizes 8192 16384 ...]

bfloat16, 16 heads of 128, causal, random data. Each figure is the time between two CUDA events around 20 queued calls,
divided by 20; sides take turns, and the median over the rounds is reported. Outputs are poisoned and compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import ringcore

CALLS = 20
HEADS, WIDTH = 16, 128


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call, of 20 queued ones."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def sides(length: int) -> dict[str, dict[str, Callable[[], object]]]:
    """For each direction what to time, by name, and checked against each other."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> torch.Tensor:
        x = torch.randn((1, length, HEADS, WIDTH), generator=generator, device="cuda").to(torch.bfloat16)
        return x.transpose(1, 2)

    q, k, v, dout = (draw() for _ in range(4))
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def add(name: str, attend: Callable[..., torch.Tensor]) -> None:
        def without_gradient() -> torch.Tensor:
            with torch.no_grad():
                return attend(q, k, v)

        out = attend(*leaves)
        forward[name] = without_gradient
        backward[name] = lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    add("ringcore", lambda q, k, v: ringcore.ring_attention(q, k, v, causal=True))
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        pass
    else:
        add(
            "flash-attn-4",
            lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[0].transpose(1, 2),
        )
    for name, backend in (("cuDNN", "CUDNN_ATTENTION"), ("FlashAttention-2", "FLASH_ATTENTION")):

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = backend) -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        add(name, attend)
    due = forward["cuDNN"]()
    due_gradients = backward["cuDNN"]()
    for name, call in forward.items():
        poison()
        out = call()
        error = float((out.float() - due.float()).abs().max())
        if not error < 0.03:
            sys.exit(f"{name}: out differs by {error}")
        poison()
        for x, y in zip(backward[name](), due_gradients, strict=True):
            error = float((x.float() - y.float()).abs().max() / y.float().abs().max())
            if not error < 0.03:
                sys.exit(f"{name}: a gradient differs by {error}")
    return {"forward": forward, "backward": backward}


def poison() -> None:
    """What the allocator hands out next is full of NaN."""
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 24,), torch.nan, device="cuda") for _ in range(40)]
    del blocks


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    options = parser.parse_args()
    results = []
    for length in options.sizes:
        for direction, calls in sides(length).items():
            times: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():
                timed(call)
            for turn in range(options.rounds):
                for name in list(calls)[:: 1 if turn % 2 else -1]:
                    times[name].append(timed(calls[name]))
            medians = {name: statistics.median(values) for name, values in times.items()}
            best = min((name for name in medians if name != "ringcore"), key=medians.__getitem__)
            flops = 2 * HEADS * length * length * WIDTH * (1 if direction == "forward" else 2.5)
            results.append(
                {
                    "length": length, "direction": direction, "ms": medians, "best": best,
                    "ringcore_over_best": medians["ringcore"] / medians[best],
                    "ringcore_tflops": flops / medians["ringcore"] / 1e9,
                }
            )  # fmt: skip
            shown = ", ".join(f"{name} {ms:.3f}" for name, ms in medians.items())
            print(
                f"{length} {direction}: {shown} ms; ringcore/best {results[-1]['ringcore_over_best']:.3f}", flush=True
            )
        torch.cuda.empty_cache()
    found = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
        "flash-attn-4": installed("flash-attn-4"), "command": " ".join(Path(word).name for word in sys.argv), "results": results,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
