"""One GPU: ring_attention against the installed fused kernels called directly, forward and backward.

    python tests/benchmarks/kernels_gpu.py [--json FILE] [--sizes 8192 16384 ...]

bfloat16, 16 heads of 128, causal, random data. Each figure is the time between two CUDA events around 20 queued calls,
divided by 20; sides take turns, and the median over the rounds is reported. Outputs are poisoned and compared first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gpu import HEADS, WIDTH, Attend, Call, aten, check, draw, flash4, in_turns, poison, save, without_gradients

import ringcore

CALLS = 20


def sides(length: int) -> dict[str, dict[str, Call]]:
    """For each direction what to time, by name, and checked against each other."""
    *arrays, dout = draw(length)
    leaves = [x.detach().requires_grad_() for x in arrays]
    attends: dict[str, Attend | None] = {
        "ringcore": lambda q, k, v: ringcore.ring_attention(q, k, v, causal=True, axes="bshd"),
        "flash-attn-4": flash4(),
        "cuDNN": aten("CUDNN_ATTENTION"),
        "FlashAttention-2": aten("FLASH_ATTENTION"),
    }
    forward: dict[str, Call] = {}
    backward: dict[str, Call] = {}
    for name, attend in attends.items():
        if attend is not None:
            forward[name] = without_gradients(attend, arrays)
            backward[name] = gradients_of(attend(*leaves), leaves, dout)
    due = forward["cuDNN"](), *backward["cuDNN"]()
    for name in forward:
        poison()
        out = forward[name]()
        poison()
        check(name, (out, *backward[name]()), due)
    return {"forward": forward, "backward": backward}


def gradients_of(out: torch.Tensor, leaves: list[torch.Tensor], dout: torch.Tensor) -> Call:
    """A call for dq, dk and dv alone."""
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    options = parser.parse_args()
    results = []
    for length in options.sizes:
        for direction, calls in sides(length).items():
            medians = in_turns(calls, CALLS, options.rounds)
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
    save(options.json, 1, results)


if __name__ == "__main__":
    main()
