"""Weights that mistakes in a ring's forward pass give, each as arithmetic that makes the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from ringcore.testing.dense import lse_of, right_weights, softmax
from ringcore.testing.meaning import branches, counted
from ringcore.testing.problem import Bools, Dealt, Floats, Problem

Weights = Callable[[Problem, Dealt], Floats]


def met(problem: Problem, dealt: Dealt, number: int) -> Bools:
    """[S, N]: which keys each query meets in this hop; a prefix is met in the first."""
    keys = dealt.keys_of_hop(number, problem.positions)
    return np.concatenate([np.full((len(keys), problem.before), number == 0), keys], axis=1)


def hops(problem: Problem, dealt: Dealt) -> Iterator[Floats]:
    """The scores of each hop, -inf for keys that a query does not meet there."""
    for number in range(dealt.size):
        yield np.where(met(problem, dealt, number), problem.scores, -np.inf)


def places(problem: Problem, dealt: Dealt) -> tuple[Floats, Floats]:
    """The places of queries [S, 1] and keys [1, keys] within their shards."""
    rows, columns = np.empty(len(dealt.owner)), np.empty(problem.positions)
    for mine, theirs in zip(dealt.rows, dealt.columns, strict=True):
        rows[list(mine)], columns[list(theirs)] = np.arange(len(mine)), np.arange(len(theirs))
    return rows[:, None], columns[None, :]


# Chunks that are softmaxed one by one, and brought together in a wrong way.


def summed(problem: Problem, dealt: Dealt) -> Floats:
    """Just added up."""
    return np.asarray(sum(softmax(scores) for scores in hops(problem, dealt)))


def averaged(problem: Problem, dealt: Dealt) -> Floats:
    """Added up and divided by the number of chunks."""
    return summed(problem, dealt) / dealt.size


def mixed(importance: Callable[[Floats], Floats]) -> Weights:
    """Weighed by the exponential of what ``importance`` makes of their scores."""

    def weights(problem: Problem, dealt: Dealt) -> Floats:
        parts = [(softmax(scores), importance(scores)) for scores in hops(problem, dealt)]
        largest = np.max([each for _, each in parts], axis=0)
        reference = np.where(np.isneginf(largest), 0.0, largest)
        powers = [np.exp(each - reference) for _, each in parts]
        total = np.sum(powers, axis=0)
        found = sum(part * power for (part, _), power in zip(parts, powers, strict=True))
        return np.asarray(found / np.where(total > 0, total, 1.0))

    return weights


def if_seen(scores: Floats) -> Floats:
    """0 for a chunk of which something is seen, [B, H, S, 1]."""
    return np.where(np.isneginf(scores.max(-1, keepdims=True)), -np.inf, 0.0)


def largest_score(scores: Floats) -> Floats:
    """[B, H, S, 1]."""
    return np.asarray(np.max(scores, axis=-1, keepdims=True))


def lse_times(factor: float) -> Callable[[Floats], Floats]:
    """lse in another base, [B, H, S, 1]."""
    return lambda scores: lse_of(scores) * factor


def lse_in_bfloat16(scores: Floats) -> Floats:
    """[B, H, S, 1]."""
    x = lse_of(scores)
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32).astype(np.float64), x)


# Sums that go on from chunk to chunk.


def carried(factor: Callable[[Floats], Floats]) -> Weights:
    """Sums that meet a new maximum times ``factor`` of the old one, in place of exp(old - new)."""

    def weights(problem: Problem, dealt: Dealt) -> Floats:
        top = np.full((*problem.scores.shape[:3], 1), -np.inf)
        power, total = np.zeros_like(problem.scores), np.zeros_like(top)
        for scores in hops(problem, dealt):
            keep = np.where(np.isneginf(top), 0.0, factor(top))
            top = np.maximum(top, np.max(scores, axis=-1, keepdims=True))
            part = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
            power, total = keep * power + part, keep * total + part.sum(-1, keepdims=True)
        return np.asarray(power / np.where(total > 0, total, 1.0))

    return weights


def undivided(problem: Problem, dealt: Dealt) -> Floats:
    """exp(scores - maximum), and no division."""
    top = np.max(problem.scores, axis=-1, keepdims=True)
    return np.asarray(np.exp(problem.scores - np.where(np.isneginf(top), 0.0, top)))


def divided_by_more(epsilon: float) -> Weights:
    """A denominator with something added to it, lest it be 0."""

    def weights(problem: Problem, dealt: Dealt) -> Floats:
        top = np.max(problem.scores, axis=-1, keepdims=True)
        reference = np.where(np.isneginf(top), 0.0, top)
        power = np.exp(problem.scores - reference)
        sink = 0.0 if problem.sinks is None else np.exp(problem.sinks[:, None, None] - reference)
        return np.asarray(power / (power.sum(-1, keepdims=True) + sink + epsilon))

    return weights


def sink_of_each_hop(problem: Problem, dealt: Dealt) -> Floats:
    """Sinks in the denominator as often as there are hops."""
    return softmax(problem.scores, problem.sinks, times=dealt.size)


def sink_of_each_hop_seen(problem: Problem, dealt: Dealt) -> Floats:
    """The same, of a ring that passes by what causal hides: as often as there are hops in which a row sees a key."""
    times = sum(~np.isneginf(scores).all(-1, keepdims=True) for scores in hops(problem, dealt))
    return softmax(problem.scores, problem.sinks, np.asarray(times, np.float64))


def prefix_of_each_rank(problem: Problem, dealt: Dealt) -> Floats:
    """Keys of a prefix as often as there are ranks."""
    times = np.where(np.arange(problem.k.shape[2]) < problem.before, np.log(dealt.size), 0.0)
    return softmax(problem.scores + times, problem.sinks)


def prefixless(problem: Problem, dealt: Dealt) -> Floats:
    """No prefix."""
    hidden = np.where(np.arange(problem.k.shape[2]) < problem.before, -np.inf, problem.scores)
    return softmax(hidden, problem.sinks)


def sinkless(problem: Problem, dealt: Dealt) -> Floats:
    """No sinks."""
    return softmax(problem.scores)


# Keys that are seen, or not, where they should not, or should.


def diagonal(sees: Callable[[Problem, Dealt], Bools]) -> Weights:
    """Another triangle [S, positions] in place of the causal one."""

    def weights(problem: Problem, dealt: Dealt) -> Floats:
        if "causal" not in problem.shown:
            return right_weights(problem)
        return right_weights(problem.showing(causal=sees(problem, dealt)))

    return weights


def triangle_in_each_hop(problem: Problem, dealt: Dealt) -> Bools:
    """Places in shards compared, whoever holds them."""
    rows, columns = places(problem, dealt)
    return np.asarray(columns <= rows)


def stripes_off_by_one(problem: Problem, dealt: Dealt) -> Bools:
    """Stripes whose diagonal belongs to all hops, those from later ranks too."""
    rows, columns = places(problem, dealt)
    later = np.array(dealt.owner)[:, None] < dealt.holder(problem.positions)[None, :]
    return np.asarray(problem.shown["causal"] | (later & (columns <= rows)))


def shifted(by: int) -> Callable[[Problem, Dealt], Bools]:
    """A diagonal that lies so many keys too far to the right."""
    return lambda problem, dealt: np.tri(problem.q.shape[2], problem.positions, by, dtype=np.bool_)


def other_way(problem: Problem, dealt: Dealt) -> Bools:
    """Hops from ranks behind are seen, those before are not: the offset of a hop has the wrong sign."""
    owner, holder = np.array(dealt.owner)[:, None], dealt.holder(problem.positions)[None, :]
    return np.where(owner == holder, triangle_in_each_hop(problem, dealt), owner < holder)


def short_by_a_shard(problem: Problem, dealt: Dealt) -> Bools:
    """A diagonal that lies a shard too far to the left; a ring of one is spared."""
    rows, columns = np.arange(problem.q.shape[2])[:, None], np.arange(problem.positions)[None, :]
    shard = len(dealt.columns[0]) if dealt.size > 1 else 0
    return np.asarray(columns <= rows - shard)


def offset_added(problem: Problem, dealt: Dealt) -> Bools:
    """Places of keys in their shards are compared with positions of queries, and where the shard begins is added."""
    rows, (_, columns) = np.arange(problem.q.shape[2])[:, None], places(problem, dealt)
    starts = np.array([min(shard, default=0) for shard in dealt.columns])
    return np.asarray(columns <= rows + starts[dealt.holder(problem.positions)])


def window_of_each_hop(problem: Problem, dealt: Dealt) -> Floats:
    """A window between places in shards, whoever holds them."""
    if problem.window is None:
        return right_weights(problem)
    left, right = (np.inf if side is None else side for side in problem.window)
    rows, columns = places(problem, dealt)
    return right_weights(problem.showing(window=(rows - columns <= left) & (columns - rows <= right)))


def without(name: str) -> Weights:
    """A keyword ignored."""
    return lambda problem, dealt: right_weights(problem.without(name))


def everything(problem: Problem, dealt: Dealt) -> Floats:
    """Nothing is hidden."""
    return right_weights(replace(problem, shown={}))


def own_keys(problem: Problem, dealt: Dealt) -> Floats:
    """The keys of a query's own rank."""
    return right_weights(problem.showing(own=dealt.keys_of_hop(0, problem.positions)))


def floored(problem: Problem, dealt: Dealt) -> Floats:
    """As many keys as the ring divides."""
    kept = np.arange(problem.positions) < problem.positions // dealt.size * dealt.size
    return right_weights(problem.showing(kept=kept))


def overwritten(problem: Problem, dealt: Dealt) -> Floats:
    """Blocks that the next overwrites before they left: each hop but the first brings that of the hop behind."""
    came = [dealt.keys_of_hop(number and number + 1, problem.positions) for number in range(dealt.size)]
    with np.errstate(divide="ignore"):
        times = np.log(np.sum(came, axis=0))
    times = np.concatenate([np.zeros((len(times), problem.before)), times], axis=1)
    return softmax(problem.scores + times, problem.sinks)


def averages(problem: Problem, dealt: Dealt) -> Floats:
    """A finite sentinel: a row that sees no key gets the average of all."""
    weights = right_weights(problem)
    empty = np.isneginf(problem.scores).all(-1, keepdims=True)
    return np.where(empty, 1 / problem.k.shape[2], weights)


def scaled_by(scale: Callable[[int], float]) -> Weights:
    """Scores that are multiplied by something else, a function of the width."""

    def weights(problem: Problem, dealt: Dealt) -> Floats:
        other = replace(problem, scale=scale(problem.q.shape[3]))
        return softmax(other.scores, problem.sinks)

    return weights


def heads_as_one(problem: Problem, dealt: Dealt) -> Floats:
    """Scores are the sum over all heads, and their scale that of a head as wide as all."""
    heads = problem.q.shape[1]
    scores = np.broadcast_to(problem.raw.sum(1, keepdims=True) / np.sqrt(heads), problem.scores.shape)
    return softmax(np.where(np.isneginf(problem.scores), -np.inf, scores + (problem.scores - problem.raw)))


def blocks_of_heads(problem: Problem, dealt: Dealt) -> Floats:
    """Dilated attention whose offsets belong to blocks of heads, h // ceil(H / r), and not to h mod r."""
    if not problem.dilation:
        return right_weights(problem)
    lengths, rates = zip(*problem.dilation, strict=True)
    keywords = {"segment_lengths": lengths, "dilation_rates": rates, "head_offset": "block"}
    heads, positions = problem.q.shape[1], problem.positions
    return right_weights(replace(problem, added={**problem.added, "dilated": counted(heads, positions, keywords)}))


def branches_averaged(problem: Problem, dealt: Dealt) -> Floats:
    """Each branch of dilated attention by its own softmax, added up and divided by their number."""
    if not problem.dilation:
        return right_weights(problem)
    parts = branch_scores(problem)
    return np.asarray(sum(softmax(scores) for scores in parts) / len(parts))


def branch_scores(problem: Problem) -> list[Floats]:
    """The scores of each branch of dilated attention, -inf for keys that it does not show."""
    lengths, rates = zip(*problem.dilation, strict=True)
    shown = branches(problem.q.shape[1], problem.positions, {"segment_lengths": lengths, "dilation_rates": rates})
    alone = problem.without("dilated").scores
    return [np.where(each, alone, -np.inf) for each in shown]
