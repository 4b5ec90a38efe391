"""How even balanced layouts are, and how many blocks of scores kernels touch in vain: counted from plans, not timed.

    python -P tests/benchmarks/balance.py [--json FILE]

131,072 positions over 8 ranks. Work is counted in visible pairs, with 500,000 more for each tile (launch): "unevenness"
is that of the most loaded rank over the mean, "slowest" over an equal part of the visible pairs alone. Blocks are 128 x 128: those that kernels touch, tile by tile, over those of one whole
causal matrix of these documents that hold a visible pair.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packed import log_normal_documents

import ringcore
from ringcore.balance import loads
from ringcore.schedule import ring_plans
from ringcore.tiling import Visibility

LENGTH, SIZE, SIDE = 131_072, 8, 128
CALLS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "causal window of 4096": {"causal": True, "window": 4096},
    **{f"documents, draw {seed}": {"causal": True, "cu_seqlens": log_normal_documents(seed)} for seed in range(6)},
}


def plans_of(layout, call):
    window = call.get("window")
    ends = call.get("cu_seqlens")
    documents = None if ends is None else ringcore.Documents.from_cu_seqlens(ends).of_entries(1)
    window = (None, None) if window is None else (window - 1, 0)
    visible = Visibility(call.get("causal", False), window, (0,), (LENGTH,), heads=1, key_heads=1, documents=documents)
    return ring_plans(layout, layout, visible)


def resolved(name):
    return ringcore.resolve_layout(name, LENGTH, SIZE)


def unevenness(plans):
    work = loads(plans)
    return round(max(work) / (sum(work) / SIZE), 4)


def slowest(plans):
    return round(max(loads(plans)) / (sum(loads(plans, launch=0)) / SIZE), 4)


def touched(tile):
    """The blocks of a tile, counted from its corner, that hold a visible pair."""
    count = 0
    for row in range(0, tile.height, SIDE):
        first, last = tile.band.columns(row, min(row + SIDE, tile.height), tile.width)
        if first < last:
            count += -(-last // SIDE) - first // SIDE
    return count


def due(ends):
    """The blocks of the whole matrix that hold a visible pair: each row of blocks sees one stretch of keys."""
    starts = [start for start, stop in pairwise(ends) for _ in range(start, stop)]
    return sum((row + SIDE) // SIDE - starts[row] // SIDE for row in range(0, LENGTH, SIDE))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    file = parser.parse_args().json
    lines = []
    for name, call in CALLS.items():
        layout = ringcore.balanced(LENGTH, SIZE, **call)
        plans, named = plans_of(layout, call), ("zigzag", "contiguous", "striped")
        line = {
            "call": name,
            "pieces a rank": max(map(len, layout.shards)),
            "tiles": sum(len(plan.tiles) for plan in plans),
            "unevenness": unevenness(plans),
            "slowest": slowest(plans),
            **{f"slowest {each}": slowest(plans_of(resolved(each), call)) for each in named},
        }
        if "cu_seqlens" in call:
            line["documents"] = len(call["cu_seqlens"]) - 1
            blocks = sum(touched(tile) for plan in plans for tile in plan.tiles)
            line["blocks over due"] = round(blocks / due(call["cu_seqlens"]), 4)
        lines.append(line)
        print(", ".join(f"{what} {value}" for what, value in line.items()), flush=True)
    if file is not None:
        found = {
            "command": f"{Path(__file__).name} --json {file.name}",
            "ringcore": ringcore.__version__,
            "lines": lines,
        }
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
