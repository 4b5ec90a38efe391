"""Does bfloat16 training on a ring follow the loss curve of one GPU? The small Llama of docs/examples/train_llama.py.

    torchrun --nproc-per-node 2 tests/benchmarks/training_gpu.py [--json FILE] [--steps 100] [--length 2048]
    torchrun --nproc-per-node 2 tests/benchmarks/training_gpu.py --device cpu --steps 5 --length 96

Activations in bfloat16 by autocast, parameters and AdamW in float32; seed, data and order are the same in every run.
One GPU trains several times: by torch's attention as it chooses (the reference), by each of its kernels, and by the
reference's with the sequences of each batch in reverse order. These differ in rounding alone, and how far their curves
part is what rounding does to this model. The ring follows if its relative difference to the reference, as the root of
its mean square over all steps, is at most three times that of the run that parts most: each run is but one draw of
what rounding may do. The largest difference is shown too, but it is the luck of one step. Exits with 1 if the ring does
not follow. (On a CPU, a ring that does not add up its gradients is off by 170 times the yardstick after 8 steps.)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu
import torch
import torch.distributed as dist

import ringcore_transformers

REVERSED = "reversed"
KERNELS = {"math": "MATH", "flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
ALLOWED = 3.0  # the ring's difference over the yardstick


def example() -> ModuleType:
    """The example's module: its model, its text and its steps."""
    path = Path(__file__).parents[2] / "docs" / "examples" / "train_llama.py"
    spec = importlib.util.spec_from_file_location("train_llama", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curves(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """The losses of each run, by its name. Every rank computes those of one GPU too, rather than wait."""
    module, found = example(), {}
    in_order = module.batches
    for name in ("stock", REVERSED, *KERNELS, "ring"):
        alone = name != "ring"
        options.attention = "sdpa" if alone else "ringcore"
        ring = None if alone else dist.group.WORLD
        place = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        only = contextlib.nullcontext()
        if name in KERNELS:
            only = torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, KERNELS[name]))
        module.batches = reversed_batches(in_order) if name == REVERSED else in_order
        start, said = time.monotonic(), ""
        try:
            with only, contextlib.redirect_stdout(io.StringIO()):
                found[name] = module.train(options, ring, *place, device)
        except RuntimeError as exc:
            if name not in KERNELS:
                raise
            said = f", left out: {exc}"  # it does not run here, or not such heads
        if dist.get_rank() == 0:
            print(f"{name}: {time.monotonic() - start:.1f} s{said}", flush=True)
    return found


def reversed_batches(batches: Callable[..., Any]) -> Callable[..., Any]:
    """The same batches, each with its sequences in reverse order."""
    return lambda *given: ({name: x.flip(0) for name, x in batch.items()} for batch in batches(*given))


def judged(losses: dict[str, list[float]]) -> dict[str, Any]:
    """How far each curve is from the reference, and whether the ring's follows."""
    reference = losses["stock"]
    parted = {
        name: [abs(x - y) / y for x, y in zip(curve, reference, strict=True)]
        for name, curve in losses.items()
        if name != "stock"
    }
    usual = {name: math.sqrt(sum(x * x for x in found) / len(found)) for name, found in parted.items()}
    allowed = ALLOWED * max(size for name, size in usual.items() if name != "ring")
    return {
        "relative_difference": usual, "largest_relative_difference": {name: max(x) for name, x in parted.items()},
        "allowed": allowed, "follows": usual["ring"] <= allowed,
    }  # fmt: skip


def show(losses: dict[str, list[float]], verdict: dict[str, Any]) -> None:
    """The curves at some steps, and the verdict."""
    steps = len(losses["stock"])
    print("step  " + "".join(f"{name:>10}" for name in losses))
    for step in sorted({0, 1, 3, *range(9, steps, 10), steps - 1} & set(range(steps))):
        print(f"{step + 1:4d}  " + "".join(f"{curve[step]:10.5f}" for curve in losses.values()))
    for words in ("relative_difference", "largest_relative_difference"):
        shown = ", ".join(f"{name} {size:.2e}" for name, size in verdict[words].items())
        print(f"{words.replace('_', ' ')} to stock: {shown}")
    word = "follows" if verdict["follows"] else "DOES NOT FOLLOW"
    print(f"the ring {word}: {verdict['relative_difference']['ring']:.2e} of at most {verdict['allowed']:.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    options.dtype, options.layout = "bfloat16", "zigzag"
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo")
    ringcore_transformers.register(ring=dist.group.WORLD, layout=options.layout)
    losses = curves(options, device)
    verdict = judged(losses)
    if dist.get_rank() == 0:
        show(losses, verdict)
        kept = {name: getattr(options, name) for name in ("steps", "length", "batch", "rate", "dtype", "layout")}
        gpus = dist.get_world_size() if options.device == "cuda" else 0
        gpu.save(options.json, gpus, {**kept, "losses": losses, **verdict})
    dist.destroy_process_group()
    sys.exit(not verdict["follows"])


if __name__ == "__main__":
    main()
