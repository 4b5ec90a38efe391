"""What a run of the suite found, kept as JSON: its counts, on what hardware, with which versions, by which command."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "ringcore", "numpy", "array-api-strict", "torch", "triton", "flash-attn-4", "nvidia-cudnn-frontend", "cupy-cuda13x",
    "jax", "mpi4py", "mpich",
)  # fmt: skip
COUNTED = ("passed", "failed", "error", "skipped")


def run(options: dict[str, str], ranks: int, outcomes: dict[str, Sequence[Any]], gpus: Sequence[str]) -> dict[str, Any]:
    """One run: its options, how many tests had each outcome, and where it ran."""
    return {
        **options, "ranks": ranks, **{name: len(outcomes.get(name, ())) for name in COUNTED}, "gpus": list(gpus),
        "cpu": processor(), "python": platform.python_version(), "versions": versions(),
        "command": shlex.join(["pytest", *map(portable, sys.argv[1:])]),
    }  # fmt: skip


def add(path: Path, one: dict[str, Any]) -> None:
    """Add a run to the file, in place of an earlier one of the same backend, ring, cases and number of ranks."""

    def kind(x: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(x[name] for name in ("backend", "ring", "cases", "part", "ranks"))

    earlier = json.loads(path.read_text()) if path.exists() else []
    kept = [x for x in earlier if kind(x) != kind(one)]
    path.write_text(json.dumps([*kept, one], indent=1) + "\n")


def portable(word: str) -> str:
    """A word of the command without the folders of this machine."""
    return Path(word).name if Path(word).is_absolute() else word


def processor() -> str:
    """The name of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    """Those of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
