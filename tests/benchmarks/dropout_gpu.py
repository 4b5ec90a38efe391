"""One GPU: what dropout costs in ringcore's kernels in Triton, beside that of torch's FlashAttention-2.

    python tests/benchmarks/dropout_gpu.py [--json FILE] [--length 16384]

bfloat16, 16 heads of 128, causal, a rate of 0.1, random data. Each figure is the time between two CUDA events around
queued calls, divided by their number; sides take turns, and medians over the rounds are reported. ringcore's out and
gradients with dropout are first compared with the reference kernels' on 1,024 rows of two heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gpu import Attend, Call, check, draw, in_turns, poison, save, with_gradients, without_gradients

import ringcore

RATE, SEED, CHECKED = 0.1, 5, 1024


def ours(rate: float, kernels: str = "torch.cuda.triton") -> Attend:
    """ringcore's attention over [B, S, H, D]."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ringcore.ring_attention(
            q, k, v, causal=True, axes="bshd", dropout=rate, dropout_seed=SEED, kernels=kernels
        )
        return out

    return attend


def flash2(rate: float) -> Attend:
    """Torch's FlashAttention-2 over [B, S, H, D], with dropout of its own."""
    only = torch.nn.attention.SDPBackend.FLASH_ATTENTION

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(only):
            first = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(*first, is_causal=True, dropout_p=rate)
            return out.transpose(1, 2)

    return attend


def checked() -> None:
    """Raise ValueError unless out and gradients are the reference kernels'."""
    q, k, v, dout = (x[:, :, :2] for x in draw(CHECKED))
    poison()
    came = with_gradients(ours(RATE), [q, k, v], dout)()
    check("ringcore with dropout", came, with_gradients(ours(RATE, "reference"), [q, k, v], dout)())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=16384)
    options = parser.parse_args()
    checked()
    *arrays, dout = draw(options.length)
    attends = {
        "ringcore": ours(0.0), "ringcore, dropout": ours(RATE), "FlashAttention-2": flash2(0.0),
        "FlashAttention-2, dropout": flash2(RATE),
    }  # fmt: skip
    results = []
    for direction in ("forward", "forward and backward"):
        sides: dict[str, Call] = {
            name: without_gradients(attend, arrays) if direction == "forward" else with_gradients(attend, arrays, dout)
            for name, attend in attends.items()
        }
        ms = in_turns(sides, 5, options.rounds)
        results.append({"length": options.length, "direction": direction, "rate": RATE, "ms": ms})
        shown = ", ".join(f"{name} {spent:.3f}" for name, spent in ms.items())
        print(f"{options.length} {direction}: {shown} ms", flush=True)
    save(options.json, 1, results)


if __name__ == "__main__":
    main()
