"""Dilated attention on one GPU: does the time fall as the work does, and how long do other packages take?

    python -P tests/benchmarks/dilated_gpu.py --packages WHEELS [--json FILE] [--length 1048576]
    python -P tests/benchmarks/dilated_gpu.py --packages WHEELS --device cpu --length 4096 --segment 256 --heads 16 \
--width 16

bfloat16, causal, 16 heads of 128, random data [1, N, H, D], LongNet's branches: segments of 2,048 to 32,768 positions,
rates of 1 to 16. WHEELS is a folder with the wheels of dilated-attention-pytorch, torchscale-gml and einops, which run
over stand-ins for xformers and flash_attn (`dilated_peers`); without them those sides are left out. Stages, each of
which prints what it finds and rewrites FILE:

check    out and gradients of every side on a short sequence against dense attention in float64, whose scores have the
         logarithm of how often a pair counts added
ours     ringcore's time, the first call's and the host's share of it, launches, and which kernels the GPU ran
peers    each package with its fastest kernel, in turns with ringcore, at the longest length that fits the memory
segments kernels alone on the segments of the first branch, as a batch and end to end, and ringcore with that branch
         alone: what rate the branches could have
dense    dense causal attention by ringcore and by cuDNN at an eighth and a quarter of the length, in turns; the better
         at the whole length once. "share" is the speed-up over it, over the ratio of visible pairs: 1 would be the
         dense kernel's own rate

In memory that was filled with NaN every side is called once, which compiles its kernels, and 64 rows of what it gives
are compared with the definition, before it is timed between CUDA events.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dilated_peers as peers
import gpu
import packed_peers
import torch
from gpu import Attend, Call, Tensor, with_gradients, without_gradients

import ringcore

BRANCHES = 5
DIRECTIONS = ("forward", "forward and backward")
FLOPS = (4, 14)  # for each pair and number of a head's width, by direction
_SPARE = 6 << 30  # bytes that kernels may want beside the allocator's
STAGES = ("check", "ours", "peers", "segments", "dense")
Branches = peers.Branches


class Run:
    """What was asked for, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.length, self.heads, self.width, self.device = options.length, options.heads, options.width, options.device
        self.rounds, self.json = options.rounds, options.json
        self.branches = branches(options.segment)
        self.check_length = options.check_length or (4096 if self.cuda else 512)
        self.results: dict[str, Any] = {
            "length": self.length, "heads": self.heads, "width": self.width, "branches": self.branches,
            "left_out": dict(peers.LEFT_OUT), "promises": {name: peer.promises for name, peer in peers.PEERS.items()},
        }  # fmt: skip
        self.started = time.monotonic()

    @property
    def cuda(self) -> bool:
        """Whether this is about a GPU."""
        return bool(self.device == "cuda")

    def found(self, stage: str, **line: Any) -> None:
        """Keep, print and write what was found."""
        line["at_second"] = round(time.monotonic() - self.started, 1)
        self.results.setdefault(stage, []).append(_finite(line))
        print(stage, line, flush=True)
        gpu.save(self.json, int(self.cuda), self.results)

    def draw(self, length: int, count: int = 4) -> list[Tensor]:
        """q, k, v and dout [1, length, heads, width]."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = 1, length, self.heads, self.width
        kind = {"dtype": torch.bfloat16, "device": self.device}
        return [torch.randn(shape, generator=generator, **kind) for _ in range(count)]

    def ours(self, given: Branches, head_offset: str = "modulo", **further: Any) -> Attend:
        """ringcore's dilated attention."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = ringcore.dilated_attention(
                q, k, v, **given, head_offset=head_offset, causal=True, axes="bshd", **further
            )
            return out

        return attend

    def poison(self) -> None:
        """What the allocator hands out next is full of NaN, large blocks and small ones."""
        gc.collect()
        sizes = [1 << 16] * 64
        if self.cuda:
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
            sizes.append(max(0, free - _SPARE) // 4)
        blocks = [torch.full((size,), torch.nan, device=self.device) for size in sizes]
        del blocks
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Until the device has nothing to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self) -> float | None:
        """Gigabytes that were in use at most since memory was poisoned."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def timed(self, call: Call) -> float:
        """Seconds of one call."""
        if self.cuda:
            return gpu.timed(call, 1) / 1e3
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def in_turns(self, sides: dict[str, Call], rounds: int) -> dict[str, float]:
        """The median seconds of each side; the order alternates."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                times[name].append(self.timed(sides[name]))
        return {name: statistics.median(found) for name, found in times.items()}


def branches(segment: int) -> Branches:
    """Segments from so many positions on, each twice as long and as sparse as the one before."""
    return {
        "segment_lengths": [segment << n for n in range(BRANCHES)],
        "dilation_rates": [1 << n for n in range(BRANCHES)],
    }


def pairs(length: int, given: Branches, heads: list[int]) -> int:
    """Visible pairs, causal, over the heads that each branch has, where lengths divide."""
    found = 0
    for w, r, count in zip(given["segment_lengths"], given["dilation_rates"], heads, strict=True):
        rows = w // r
        found += count * (length // w) * (rows * (rows + 1) // 2)
    return found


def offsets_of(rate: int, heads: int, head_offset: str) -> list[int]:
    """Each head's offset."""
    return [h % rate if head_offset == "modulo" else h // -(-heads // rate) for h in range(heads)]


def times_seen(rows: Tensor, keys: Tensor, given: Branches, heads: int, head_offset: str) -> Tensor:
    """How often each row sees each key, [heads, rows, keys]: integers."""
    i, j = rows[:, None], keys[None, :]
    found = torch.zeros((heads, len(rows), len(keys)), dtype=torch.int64, device=rows.device)
    for w, r in zip(given["segment_lengths"], given["dilation_rates"], strict=True):
        offsets = torch.tensor(offsets_of(r, heads, head_offset), device=rows.device)[:, None, None]
        found += (i // w == j // w) & ((i % w) % r == offsets) & ((j % w) % r == offsets) & (j <= i)
    return found


def rows_off(out: Tensor, arrays: list[Tensor], given: Branches, head_offset: str = "modulo", count: int = 64) -> float:
    """The largest difference of some rows from the definition, over the largest number that is due in the row."""
    q, k, v = (x[0] for x in arrays)
    length, heads, width = q.shape
    longest, worst = max(given["segment_lengths"]), 0.0
    for i in torch.randint(length, (count,), generator=torch.Generator().manual_seed(1)).tolist():
        keys = torch.arange(i // longest * longest, i + 1, device=q.device)
        times = times_seen(torch.tensor([i], device=q.device), keys, given, heads, head_offset)[:, 0]
        for head in range(heads):  # one at a time, for memory
            mine, values = (x[int(keys[0]) : i + 1, head].double() for x in (k, v))
            weights = (mine @ q[i, head].double() / math.sqrt(width) + times[head].double().log()).softmax(0)
            worst = max(worst, _over(out[0, i, head], weights @ values))
    return worst


def due_of(arrays: list[Tensor], dout: Tensor, given: Branches, head_offset: str) -> list[Tensor]:
    """out, dq, dk and dv of dense attention in float64 with the bias log m."""
    leaves = [x[0].double().transpose(0, 1).detach().requires_grad_() for x in arrays]
    q, k, v = leaves
    places = torch.arange(q.shape[1], device=q.device)
    bias = times_seen(places, places, given, q.shape[0], head_offset).double().log()
    out = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2]) + bias).softmax(-1) @ v
    found = torch.autograd.grad(out, leaves, dout[0].double().transpose(0, 1))
    return [x.detach().transpose(0, 1)[None] for x in (out, *found)]


def check(run: Run) -> None:
    """Every side on a short sequence; ringcore must be right, of the others it is told how far they are off."""
    given = branches(run.branches["segment_lengths"][0] // 16)
    *arrays, dout = run.draw(run.check_length)
    for head_offset in ("modulo", "block"):
        due = due_of(arrays, dout, given, head_offset)
        sides: dict[str, Attend] = {"ringcore": run.ours(given, head_offset)}
        for name, peer in peers.PEERS.items():
            if peer.head_offset == head_offset and name not in run.results["left_out"]:
                sides |= attempt(run, name, lambda peer=peer: peer.make(given, run.heads, run.width, run.device))
        for name, attend in sides.items():
            run.poison()
            try:
                came = with_gradients(attend, arrays, dout)()
            except Exception as exc:
                if name == "ringcore":
                    raise
                run.found("check", side=name, failed=f"{type(exc).__name__}: {exc}"[:300])
                continue
            errors = {part: _over(x, y) for part, x, y in zip(gpu.NAMES, came, due, strict=True)}
            run.found("check", side=name, length=run.check_length, head_offset=head_offset, off=errors)
            if name == "ringcore" and not max(errors.values()) < 0.03:
                raise ValueError(f"ringcore is off by {errors} of the largest number due")


def attempt(run: Run, name: str, make: Callable[[], Attend]) -> dict[str, Attend]:
    """A side of this name, or none, and why."""
    try:
        return {name: make()}
    except Exception as exc:
        run.results["left_out"][name] = f"{type(exc).__name__}: {exc}"[:300]
        print("left out", name, run.results["left_out"][name], flush=True)
        return {}


def ours(run: Run) -> None:
    """ringcore's times and launches, at the longest lengths that fit."""
    for place, direction in enumerate(DIRECTIONS):
        found = longest(run, functools.partial(_first, run, place))
        for key, value in found.pop("launches").items():
            run.results.setdefault("launches", {})[f"{direction}, {key}"] = value
        run.found("ours", direction=direction, **found)


def _first(run: Run, place: int, length: int) -> dict[str, Any]:
    """One side of ours in fresh memory: checked, timed, and looked at."""
    *arrays, dout = run.draw(length)
    call = _direction(run.ours(run.branches), arrays, dout, place)
    run.poison()
    start = time.perf_counter()
    out = call()
    run.wait()
    first = time.perf_counter() - start
    error = rows_off(out[0] if place else out, arrays, run.branches)
    if not error < 0.03:
        raise ValueError(f"ringcore's rows are off by {error} of the largest number due")
    del out
    peak = run.peak()
    host = []
    for _ in range(run.rounds):
        run.wait()
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
    seconds = statistics.median(run.timed(call) for _ in range(run.rounds))
    seen = pairs(length, run.branches, [run.heads] * BRANCHES)
    counted = Counted(ringcore.explain(*arrays, causal=True, axes="bshd", wrt=("q", "k", "v")[: 3 * place]).kernels)
    for _ in range(2):  # the first time the kernels are tried out
        counted.calls = dict.fromkeys(counted.calls, 0)
        _direction(run.ours(run.branches, kernels=counted), arrays, dout, place)()
    return {
        "length": length, "seconds": seconds, "host_milliseconds": statistics.median(host) * 1e3,
        "first_call_seconds": first, "pairs": seen, "giga_pairs_per_second": seen / seconds / 1e9,
        "teraflops": seen * run.width * FLOPS[place] / seconds / 1e12, "rows_off": error, "peak_gigabytes": peak,
        "kernels": counted.capabilities.name, "calls_of_kernels": counted.calls,
        "launches": profiled(run, call),
    }  # fmt: skip


class Counted:
    """Kernels, by name, whose calls are counted."""

    def __init__(self, name: str) -> None:
        (point,) = entry_points(group="ringcore.kernels", name=name)
        self._kernels = point.load()(sharers=1)
        self.capabilities = self._kernels.capabilities
        self.calls = {"forward": 0, "backward": 0}

    def forward(self, *arrays: Any, **keywords: Any) -> Any:
        """As the kernels'."""
        self.calls["forward"] += 1
        return self._kernels.forward(*arrays, **keywords)

    def backward(self, *arrays: Any, **keywords: Any) -> Any:
        """As the kernels'."""
        self.calls["backward"] += 1
        return self._kernels.backward(*arrays, **keywords)


def profiled(run: Run, call: Call) -> dict[str, Any]:
    """Launches and milliseconds by the name of what ran on the device, the longest first; why not, if it fails."""
    kinds = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[kinds.CUDA if run.cuda else kinds.CPU]) as profile:
            call()
            run.wait()
        spent = "self_device_time_total" if run.cuda else "self_cpu_time_total"
        ran = [(x.key, x.count, getattr(x, spent) / 1e3) for x in profile.key_averages() if getattr(x, spent) > 0]
    except Exception as exc:
        return {"failed": f"{type(exc).__name__}: {exc}"[:300]}
    ran.sort(key=lambda line: -line[2])
    print(*(f"    {count:6d} x {name[:100]}: {spent:.3f} ms" for name, count, spent in ran[:14]), sep="\n", flush=True)
    lines = [{"name": name[:160], "count": count, "milliseconds": spent} for name, count, spent in ran[:14]]
    return {"count": sum(line[1] for line in ran), "milliseconds": sum(line[2] for line in ran), "longest": lines}


def against_peers(run: Run) -> None:
    """Each package with its fastest kernel, in turns with ringcore."""
    for name, peer in peers.PEERS.items():
        made = attempt(run, name, lambda peer=peer: peer.make(run.branches, run.heads, run.width, run.device))
        if not made:
            continue
        for place, direction in enumerate(DIRECTIONS):
            chosen, trials = fastest(run, made[name], min(run.length, max(run.branches["segment_lengths"]) * 4), place)
            if chosen is None:
                run.found("peers", side=name, direction=direction, failed=trials)
                continue
            peers.use(peers.KERNELS[run.device][chosen])
            try:
                found = longest(run, functools.partial(_in_turns, run, peer, made[name], place))
            except RuntimeError as exc:
                found = {"failed": f"{type(exc).__name__}: {exc}"[:300]}
            run.found(
                "peers", side=name, version=peer.version, direction=direction, kernel=chosen,
                trials_of_kernels=trials, **found,
            )  # fmt: skip
    for direction in DIRECTIONS:
        over = {
            line["side"]: {key: line[key] for key in ("over", "over_for_a_pair", "length", "rows_off")}
            for line in run.results.get("peers", [])
            if line["direction"] == direction and "over" in line
        }
        if over:
            best, best_for_a_pair = (
                min(over.values(), key=lambda x: x[key])[key] for key in ("over", "over_for_a_pair")
            )
            run.found("best_peer", direction=direction, over=best, over_for_a_pair=best_for_a_pair, of=over)


def fastest(run: Run, attend: Attend, length: int, place: int) -> tuple[str | None, dict[str, Any]]:
    """The kernel with which a package is fastest at a short length, and the seconds with each, or why not."""
    *arrays, dout = run.draw(length)
    call = _direction(attend, arrays, dout, place)
    trials: dict[str, Any] = {}
    for name, kernel in peers.KERNELS[run.device].items():
        peers.use(kernel)
        try:
            call()
            trials[name] = statistics.median(run.timed(call) for _ in range(3))
        except Exception as exc:
            trials[name] = f"{type(exc).__name__}: {exc}"[:300]
    able = [name for name in trials if isinstance(trials[name], float)]
    return min(able, key=trials.__getitem__, default=None), trials


def _in_turns(run: Run, peer: peers.Peer, attend: Attend, place: int, length: int) -> dict[str, Any]:
    """A package and ringcore at one length."""
    *arrays, dout = run.draw(length)
    sides = {
        "theirs": _direction(attend, arrays, dout, place),
        "ringcore": _direction(run.ours(run.branches, peer.head_offset), arrays, dout, place),
    }
    off, peak = {}, {}
    for side, call in sides.items():
        run.poison()
        out = call()
        off[side] = rows_off(out[0] if place else out, arrays, run.branches, peer.head_offset)
        del out
        peak[side] = run.peak()
    if not off["ringcore"] < 0.03:
        raise ValueError(f"ringcore's rows are off by {off['ringcore']} of the largest number due")
    seconds = run.in_turns(sides, run.rounds)
    seen = {
        "theirs": pairs(length, run.branches, peer.heads(run.branches, run.heads)),
        "ringcore": pairs(length, run.branches, [run.heads] * BRANCHES),
    }
    over = seconds["theirs"] / seconds["ringcore"]
    return {
        "length": length, "seconds": seconds, "pairs": seen, "over": over,
        "over_for_a_pair": over * seen["ringcore"] / seen["theirs"], "rows_off": off, "peak_gigabytes": peak,
    }  # fmt: skip


def segments(run: Run) -> None:
    """Kernels alone on the segments of the first branch, as a batch and end to end, and ringcore with that branch."""
    side, everywhere = run.branches["segment_lengths"][0], [run.heads] * BRANCHES
    seen = run.length // side * (side * (side + 1) // 2) * run.heads
    sides: dict[str, Attend] = {
        f"{name}, a batch": functools.partial(_as_batch, kernel, side)
        for name, kernel in peers.KERNELS[run.device].items()
    }
    end_to_end = packed_peers.flash4(list(range(0, run.length + 1, side))) if run.cuda else None
    if end_to_end is not None:
        sides["flash-attn-4, end to end"] = end_to_end
    sides["ringcore, this branch"] = run.ours({"segment_lengths": [side], "dilation_rates": [1]})
    for place, direction in enumerate(DIRECTIONS):
        *arrays, dout = run.draw(run.length)
        for name, attend in sides.items():
            call = _direction(attend, arrays, dout, place)
            try:
                run.poison()
                out = call()
                off = rows_off(out[0] if place else out, arrays, {"segment_lengths": [side], "dilation_rates": [1]})
                del out
                seconds = statistics.median(run.timed(call) for _ in range(run.rounds))
            except Exception as exc:
                run.found("segments", side=name, direction=direction, failed=f"{type(exc).__name__}: {exc}"[:300])
                continue
            run.found(
                "segments", side=name, direction=direction, seconds=seconds, giga_pairs_per_second=seen / seconds / 1e9,
                teraflops=seen * run.width * FLOPS[place] / seconds / 1e12,
                all_branches_at_this_rate=seconds * pairs(run.length, run.branches, everywhere) / seen, rows_off=off,
            )  # fmt: skip


def _as_batch(kernel: peers.Kernel, side: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within segments of so many rows of q, k and v [1, N, H, D]."""
    batch = (x.unflatten(1, (-1, side)).flatten(0, 1) for x in (q, k, v))
    return kernel(*batch, True, None)[0].reshape(q.shape)


def dense(run: Run) -> None:
    """Dense causal attention: both sides where it is short, the better one at the whole length."""

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ringcore.ring_attention(q, k, v, causal=True, axes="bshd")
        return out

    torchs = gpu.aten("CUDNN_ATTENTION" if run.cuda else "FLASH_ATTENTION")
    candidates: dict[str, Attend] = {"ringcore": whole, "torch cuDNN" if run.cuda else "torch": torchs}
    for place, direction in enumerate(DIRECTIONS):
        for length in (run.length // 8, run.length // 4):
            short = _dense(run, candidates, length, place, warm=True)
            run.found("dense", direction=direction, length=length, **short)
        quick = short["seconds"]
        best = min(quick, key=quick.__getitem__)
        dilated = [dilated_seconds(run, place)]
        found = within_memory(
            functools.partial(
                # cuDNN makes its plan for every shape anew.
                _dense,
                run,
                {best: candidates[best]},
                run.length,
                place,
                warm=best != "ringcore",
                rows=4,
            )
        ) or {"seconds": {best: quick[best] * 16}, "extrapolated": True}
        dilated.append(dilated_seconds(run, place))
        spent, mine = found["seconds"][best], statistics.mean(dilated)
        ratio = run.length * (run.length + 1) / 2 * run.heads / pairs(run.length, run.branches, [run.heads] * BRANCHES)
        run.found(
            "share", direction=direction, length=run.length, dense=best, **found, over_a_quarter=spent / quick[best],
            dilated_before_and_after=dilated, pairs_ratio=ratio, speed_up=spent / mine, share=spent / mine / ratio,
        )  # fmt: skip


def dilated_seconds(run: Run, place: int) -> float:
    """Ours at the whole length; where it does not fit, in proportion from the longest that does."""
    fits = [line["length"] for line in run.results.get("ours", []) if line["direction"] == DIRECTIONS[place]]
    length = min(fits, default=run.length)
    *arrays, dout = run.draw(length)
    call = _direction(run.ours(run.branches), arrays, dout, place)
    call()
    return statistics.median(run.timed(call) for _ in range(run.rounds)) * run.length / length


def _dense(
    run: Run, candidates: dict[str, Attend], length: int, place: int, warm: bool, rows: int = 16
) -> dict[str, Any]:
    """The seconds of one call of each that is right, after another one if ``warm``."""
    *arrays, dout = run.draw(length)
    everything: Branches = {"segment_lengths": [length], "dilation_rates": [1]}
    seconds, off, failed = {}, {}, {}
    for name, attend in candidates.items():
        run.poison()
        call = _direction(attend, arrays, dout, place)
        kept: list[Any] = []
        try:
            if warm:
                call()
            spent = run.timed(lambda call=call, kept=kept: kept.append(call()))
            out = kept[0][0] if place else kept[0]
            kept.clear()
            off[name] = rows_off(out, arrays, everything, count=rows)
            del out
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:
            failed[name] = f"{type(exc).__name__}: {exc}"[:300]
            continue
        if off[name] < 0.03:
            seconds[name] = spent
    if not seconds:
        raise ValueError(f"no dense attention at {length}: failed {failed}, off by {off}")
    return {"seconds": seconds, "rows_off": off, "failed": failed}


def longest(run: Run, measure: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """What is found at the whole length, or at half of it, and so on: the first that fits the memory."""
    length = run.length
    while length >= max(run.branches["segment_lengths"]):
        found = within_memory(functools.partial(measure, length))
        if found is not None:
            return found
        print(f"    {length} positions do not fit the memory", flush=True)
        length //= 2
    raise MemoryError("not even one of the longest segments fits the memory")


def within_memory(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What it returns; None if the device has too little memory for it."""
    try:
        return call()
    except torch.OutOfMemoryError as exc:
        exc.__traceback__ = exc.__context__ = None  # whose frames hold arrays
    gc.collect()
    return None


def _direction(attend: Attend, arrays: list[Tensor], dout: Tensor, place: int) -> Call:
    return with_gradients(attend, arrays, dout) if place else without_gradients(attend, arrays)


def _over(came: Tensor, due: Tensor) -> float:
    """The largest difference over the largest number due; infinite for NaN."""
    off = float((came.detach().double() - due.detach()).abs().max() / due.detach().abs().max())
    return math.inf if math.isnan(off) else off


def _finite(line: Any) -> Any:
    """The same with words for what JSON has no numbers for."""
    if isinstance(line, dict):
        return {key: _finite(value) for key, value in line.items()}
    return str(line) if isinstance(line, float) and not math.isfinite(line) else line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--length", type=int, default=1 << 20)
    parser.add_argument("--segment", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check-length", type=int)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    run = Run(options)
    peers.install(options.packages)
    peers.use(next(iter(peers.KERNELS[run.device].values())))
    steps = {"check": check, "ours": ours, "peers": against_peers, "segments": segments, "dense": dense}
    for stage in STAGES:
        if stage in options.stages:
            steps[stage](run)
    print(f"{time.monotonic() - run.started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
