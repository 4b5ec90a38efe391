"""What ``ringcore attend`` says when it is done."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ringcore.cli.options import AttendOptions
from ringcore.cli.request import Request
from ringcore.explanation import transport_words
from ringcore.protocols import Transport

_STATUS = "/proc/self/status"


class Share:
    """What one rank has to tell: its times, its visible pairs, its memory, and how blocks came if not by a ring."""

    def __init__(self, rank: int, transport: Transport | None) -> None:
        self.rank, self.transport = rank, transport
        self.seconds: dict[str, float] = {}
        self.pairs = 0
        self.shard = 0
        self.words = ""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Take the time of a part of the call."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def share_note(share: Share) -> dict[str, Any]:
    """The share as a note to rank 0."""
    return {
        "seconds": share.seconds,
        "pairs": share.pairs,
        "shard": share.shard,
        "peak": peak_memory(),
        "node": 0 if share.transport is None else share.transport.node,
        "transport": share.words or ("none" if share.transport is None else transport_words(share.transport)),
        "sent": int(getattr(share.transport, "bytes_sent", 0)),
        "published": int(getattr(share.transport, "bytes_published", 0)),
    }


def peak_memory() -> int:
    """The most memory, in bytes, that this process ever had resident, shared pages included."""
    try:
        with open(_STATUS, encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summary_of(
    request: Request, options: AttendOptions, notes: Sequence[dict[str, Any]], found: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything, by name; sizes in bytes, times in seconds, each the largest over the ranks."""
    arguments = request.arguments
    pairs = sum(note["pairs"] for note in notes)
    seconds = {name: max(note["seconds"].get(name, 0.0) for note in notes) for name in notes[0]["seconds"]}
    flops = 2 * (arguments.q.shape[3] + arguments.v.shape[3]) * pairs
    ranks = options.ring_size or len(notes)
    chosen = (
        ""
        if options.layout
        else ", the default for causal with several ranks"
        if request.layout == "zigzag"
        else ", the default"
    )
    summary: dict[str, Any] = {
        "out": str(options.out),
        "q": list(request.question.q.shape),
        "k": list(request.question.k.shape),
        "v": list(request.question.v.shape),
        "axes": options.axes,
        "dtype": request.question.dtype,
        "layout": request.layout,
        "layout_reason": chosen.removeprefix(", ") or "as asked",
        "ranks": ranks,
        "processes": len(notes),
        "nodes": len({note["node"] for note in notes}),
        "backend": request.backend.name,
        "kernels": request.kernels.capabilities.name,
        "transport": notes[0]["transport"],
        "visible_pairs": pairs,
        "seconds": seconds,
        "gflops_per_second": flops / seconds["computing"] / 1e9 if seconds.get("computing") else 0.0,
        "shard_bytes": max(note["shard"] for note in notes),
        "peak_memory_bytes": max(note["peak"] for note in notes),
        "bytes_sent": sum(note["sent"] for note in notes),
        "bytes_shared": sum(note["published"] for note in notes),
    }
    if found is not None:
        summary["check"] = found
    return summary


def lines_of(summary: dict[str, Any], as_json: bool) -> str:
    """The summary as text, one fact a line, or as one JSON object."""
    if as_json:
        return json.dumps(_finite(summary)) + "\n"
    check = summary.get("check")
    place = "all in one process" if summary["processes"] == 1 else f"on {summary['nodes']} node(s)"
    facts = {
        "output": summary["out"] if check is None or check["passed"] else f"{summary['out']} (not written)",
        "shapes": f"q {summary['q']}, k {summary['k']}, v {summary['v']}, {summary['axes']}",
        "dtype": summary["dtype"],
        "layout": f"{summary['layout']} ({summary['layout_reason']})",
        "ranks": f"{summary['ranks']}, {place}",
        "kernels": f"{summary['kernels']} ({summary['backend']} arrays)",
        "transport": summary["transport"],
        "time": ", ".join(f"{name} {value:.2f} s" for name, value in summary["seconds"].items()),
        "rate": f"{summary['gflops_per_second']:.1f} GFLOP/s over {summary['visible_pairs']:,} visible pairs",
        "memory": f"peak {_size(summary['peak_memory_bytes'])} per rank, tensors {_size(summary['shard_bytes'])}",
        "sent": f"{_size(summary['bytes_sent'])} in messages, {_size(summary['bytes_shared'])} read in place",
    }
    if check is not None:
        errors = ", ".join(
            f"{name} off by {check[f'{name}_error']:.2e} (allowed {check[f'{name}_tolerance']:.2e})"
            for name in ("out", "lse")
            if f"{name}_error" in check
        )
        facts["check"] = f"{'passed' if check['passed'] else 'FAILED'}: {check['rows']} rows, {errors}"
    return "".join(f"{name:<10} {fact}\n" for name, fact in facts.items())


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _finite(value: Any) -> Any:
    """JSON has no word for infinity: None stands for it."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
