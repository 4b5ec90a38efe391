"""What is known to go wrong in attention over a ring, each as arithmetic that makes the same mistake.

An implementation is told what it has by what it gives: if that is not right, but just what one of these gives, it has
that disease. So every one of them is also a mutant, on which the telling is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ringcore.testing.problem import Bools, Dealt, Floats, Problem


@dataclass(frozen=True)
class Answer:
    """What attention gives: out [B, H, S, E], and the gradients of q, k and v; None is unknown."""

    out: Floats
    dq: Floats | None
    dk: Floats | None
    dv: Floats | None


@dataclass(frozen=True)
class Disease:
    """A mistake.

    name: what it is, in words. evidence: by what it shows. weights: the weights that it gives [B, H, S, N]; answer: all
    that it gives, where weights alone do not say it.
    """

    name: str
    evidence: str
    weights: Callable[[Problem, Dealt], Floats] | None = None
    answer: Callable[[Problem, Dealt], Answer] | None = None


def right_weights(problem: Problem) -> Floats:
    """One softmax over all keys; 0 for a query that sees none."""
    return _softmax(problem.scores, problem.sinks)


class Whole(NamedTuple):
    """An answer with all gradients."""

    out: Floats
    dq: Floats
    dk: Floats
    dv: Floats

    @property
    def answer(self) -> Answer:
        """The same."""
        return Answer(*self)


def right(problem: Problem) -> Answer:
    """Out and gradients by the definition."""
    return backward(problem, right_weights(problem)).answer


def backward(problem: Problem, weights: Floats, delta: Floats | None = None) -> Whole:
    """Out and gradients of attention that weighs so; ``delta`` [B, H, S, 1] is rowsum(dout * out) if not given."""
    v = problem.of_heads(problem.v)
    out = weights @ v
    delta = (problem.dout * out).sum(-1, keepdims=True) if delta is None else delta
    scores = weights * (problem.dout @ np.swapaxes(v, -1, -2) - delta) * problem.scale
    if problem.softcap is not None:
        scores = scores * (1 - (problem.raw / problem.softcap) ** 2)
    return Whole(
        out,
        scores @ problem.of_heads(problem.k),
        _folded(problem, np.swapaxes(scores, -1, -2) @ problem.q),
        _folded(problem, np.swapaxes(weights, -1, -2) @ problem.dout),
    )


def _folded(problem: Problem, x: Floats) -> Floats:
    batch, heads, *rest = x.shape
    return np.asarray(x.reshape(batch, heads // problem.group, problem.group, *rest).sum(2))


def _softmax(scores: Floats, sinks: Floats | None = None, times: float = 1.0) -> Floats:
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    reference = np.where(np.isneginf(top), 0.0, top)
    power = np.exp(scores - reference)
    total = power.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + times * np.exp(sinks[:, None, None] - reference)
    return np.asarray(power / np.where(total > 0, total, 1.0))


def hops(problem: Problem, dealt: Dealt) -> Iterator[Floats]:
    """The scores of each hop, -inf for keys that a query does not meet there."""
    keys = problem.k.shape[2]
    for number in range(dealt.size):
        yield np.where(dealt.keys_of_hop(number, keys), problem.scores, -np.inf)


def _lse(scores: Floats) -> Floats:
    """[B, H, S, 1]."""
    top = np.max(scores, axis=-1, keepdims=True)
    reference = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(scores - reference).sum(-1, keepdims=True)) + reference)


def _mixed(problem: Problem, dealt: Dealt, importance: Callable[[Floats], Floats]) -> Floats:
    """Hops that are softmaxed one by one, weighed by the exponential of what ``importance`` makes of their scores."""
    parts = [(_softmax(scores), importance(scores)) for scores in hops(problem, dealt)]
    largest = np.max([each for _, each in parts], axis=0)
    reference = np.where(np.isneginf(largest), 0.0, largest)
    powers = [np.exp(each - reference) for _, each in parts]
    total = np.sum(powers, axis=0)
    found = sum(part * power for (part, _), power in zip(parts, powers, strict=True))
    return np.asarray(found / np.where(total > 0, total, 1.0))


def _if_seen(scores: Floats) -> Floats:
    """0 for a chunk of which something is seen, [B, H, S, 1]."""
    return np.where(np.isneginf(scores.max(-1, keepdims=True)), -np.inf, 0.0)


def _bfloat16(x: Floats) -> Floats:
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32).astype(np.float64), x)


def _summed(problem: Problem, dealt: Dealt) -> Floats:
    return np.asarray(sum(_softmax(scores) for scores in hops(problem, dealt)))


def _unscaled(problem: Problem, dealt: Dealt) -> Floats:
    """Sums begun with one maximum and gone on with another, never rescaled."""
    top = np.full((*problem.scores.shape[:3], 1), -np.inf)
    power, total = np.zeros_like(problem.scores), np.zeros_like(top)
    for scores in hops(problem, dealt):
        top = np.maximum(top, np.max(scores, axis=-1, keepdims=True))
        part = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
        power, total = power + part, total + part.sum(-1, keepdims=True)
    return np.asarray(power / np.where(total > 0, total, 1.0))


def _undivided(problem: Problem, dealt: Dealt) -> Floats:
    top = np.max(problem.scores, axis=-1, keepdims=True)
    return np.asarray(np.exp(problem.scores - np.where(np.isneginf(top), 0.0, top)))


def _local(dealt: Dealt, keys: int) -> tuple[Floats, Floats]:
    """The places of queries [S, 1] and keys [1, N] within their shards."""
    rows, columns = np.empty(len(dealt.owner)), np.empty(keys)
    for mine, theirs in zip(dealt.rows, dealt.columns, strict=True):
        rows[list(mine)], columns[list(theirs)] = np.arange(len(mine)), np.arange(len(theirs))
    return rows[:, None], columns[None, :]


def _triangle_in_each_hop(problem: Problem, dealt: Dealt) -> Floats:
    rows, columns = _local(dealt, problem.k.shape[2])
    return right_weights(problem.seeing(columns <= rows))


def _seen_by_shift(shift: int) -> Callable[[Problem, Dealt], Floats]:
    """A causal diagonal that lies so many keys too far to the right."""

    def weights(problem: Problem, dealt: Dealt) -> Floats:
        queries, keys = problem.q.shape[2], problem.k.shape[2]
        return right_weights(problem.seeing(np.arange(keys)[None, :] <= np.arange(queries)[:, None] + shift))

    return weights


def _other_way(problem: Problem, dealt: Dealt) -> Floats:
    """Hops from ranks behind are seen, those before are not: the offset of a hop has the wrong sign."""
    keys = problem.k.shape[2]
    holder = np.empty(keys, int)
    for rank, theirs in enumerate(dealt.columns):
        holder[list(theirs)] = rank
    owner = np.array(dealt.owner)[:, None]
    rows, columns = _local(dealt, keys)
    sees = np.where(owner == holder[None, :], columns <= rows, owner < holder[None, :])
    return right_weights(problem.seeing(sees))


def _everything(problem: Problem, dealt: Dealt) -> Floats:
    return right_weights(problem.seeing(np.ones(problem.sees.shape, bool)))


def _causal_alone(problem: Problem, dealt: Dealt) -> Floats:
    """What else hides keys is ignored where causality hides some."""
    triangle: Bools = np.tri(*problem.sees.shape[-2:], dtype=np.bool_)
    causal = not (problem.sees & ~triangle).any()
    return right_weights(problem.seeing(triangle) if causal else problem)


def _uncapped(problem: Problem, dealt: Dealt) -> Answer:
    return right(replace(problem, softcap=None))


def _own_keys(problem: Problem, dealt: Dealt) -> Floats:
    keys = dealt.keys_of_hop(0, problem.k.shape[2])
    return right_weights(problem.seeing(problem.sees & keys))


def _floored(problem: Problem, dealt: Dealt) -> Floats:
    keys = problem.k.shape[2]
    kept: Bools = np.arange(keys) < keys // dealt.size * dealt.size
    return right_weights(problem.seeing(problem.sees & kept))


def _scaled_by(scale: Callable[[int], float]) -> Callable[[Problem, Dealt], Floats]:
    """Scores that are multiplied by something else, a function of the width."""

    def weights(problem: Problem, dealt: Dealt) -> Floats:
        other = replace(problem, scale=scale(problem.q.shape[3]))
        return _softmax(other.scores, problem.sinks)

    return weights


def _averages(problem: Problem, dealt: Dealt) -> Floats:
    """A finite sentinel: a row that sees no key gets the average of all."""
    weights = right_weights(problem)
    empty = ~np.broadcast_to(problem.sees, weights.shape).any(-1, keepdims=True)
    return np.where(empty, 1 / problem.k.shape[2], weights)


def _nan_of(empty: Callable[[Problem, Dealt], Bools]) -> Callable[[Problem, Dealt], Answer]:
    """NaN in the rows that ``empty`` [B, H, S, 1] says; how far it spreads in gradients depends on the framework."""

    def answer(problem: Problem, dealt: Dealt) -> Answer:
        due, rows = right(problem), np.broadcast_to(empty(problem, dealt), (*problem.q.shape[:3], 1))
        return Answer(np.where(rows, np.nan, due.out), None, None, None) if rows.any() else due

    return answer


def _unseeing(problem: Problem, dealt: Dealt) -> Bools:
    return np.logical_not(problem.sees.any(-1, keepdims=True))


def _unseeing_in_a_hop(problem: Problem, dealt: Dealt) -> Bools:
    keys = problem.k.shape[2]
    seen = [(problem.sees & dealt.keys_of_hop(number, keys)).any(-1, keepdims=True) for number in range(dealt.size)]
    return np.asarray(~np.logical_and.reduce(seen))


def _sink_of_each_hop(problem: Problem, dealt: Dealt) -> Floats:
    return _softmax(problem.scores, problem.sinks, times=dealt.size)


def _heads_turned(problem: Problem, dealt: Dealt) -> Answer:
    """Query head h reads key head h % Hk."""
    order = np.arange(problem.q.shape[1]) % problem.k.shape[1]
    turned = replace(problem, k=problem.k[:, order], v=problem.v[:, order])
    return Answer(right_weights(turned) @ turned.v, None, None, None)


def _stale(hop_of: Callable[[int], int]) -> Callable[[Problem, Dealt], Answer]:
    """Gradients of every hop made with k and v of one and the same."""

    def answer(problem: Problem, dealt: Dealt) -> Answer:
        whole = backward(problem, right_weights(problem))
        lse, k, v = _lse(problem.scores), problem.of_heads(problem.k), problem.of_heads(problem.v)
        lse = lse if problem.sinks is None else np.logaddexp(lse, problem.sinks[:, None, None])
        delta = (problem.dout * whole.out).sum(-1, keepdims=True)
        dq, dk, dv = np.zeros_like(problem.q), np.zeros_like(k), np.zeros_like(v)
        for rank, rows in enumerate(dealt.rows):
            for number in range(dealt.size):
                mine, theirs = (list(dealt.columns[(rank - n) % dealt.size]) for n in (number, hop_of(dealt.size)))
                if len(mine) != len(theirs) or not rows:
                    continue
                some = np.ix_(range(k.shape[0]), range(k.shape[1]), list(rows))
                q, dout = problem.q[some], problem.dout[some]
                sees = np.broadcast_to(problem.sees, problem.scores.shape)[some][..., mine]
                scores = problem.capped(q @ np.swapaxes(k[:, :, theirs], -1, -2) * problem.scale)
                slope = 1.0 if problem.softcap is None else 1 - (scores / problem.softcap) ** 2
                scores = np.where(sees, scores, -np.inf)
                power = np.exp(scores - np.where(np.isneginf(lse[some]), 0.0, lse[some]))
                gained = power * (dout @ np.swapaxes(v[:, :, theirs], -1, -2) - delta[some]) * slope * problem.scale
                dq[some] += gained @ k[:, :, theirs]
                dk[:, :, mine] += np.swapaxes(gained, -1, -2) @ q
                dv[:, :, mine] += np.swapaxes(power, -1, -2) @ dout
        return Answer(whole.out, dq, _folded(problem, dk), _folded(problem, dv))

    return answer


def _of_hops(local_lse: bool, local_out: bool) -> Callable[[Problem, Dealt], Answer]:
    """Gradients with statistics of a hop in place of the finished row's."""

    def answer(problem: Problem, dealt: Dealt) -> Answer:
        final = right_weights(problem)
        whole = backward(problem, final)
        found = [np.zeros_like(x) for x in (whole.dq, whole.dk, whole.dv)]
        for scores in hops(problem, dealt):
            own = _softmax(scores)
            weights = own if local_lse else np.where(np.isneginf(scores), 0.0, final)
            out = own @ problem.of_heads(problem.v) if local_out else whole.out
            gained = backward(problem, weights, (problem.dout * out).sum(-1, keepdims=True))
            found = [x + y for x, y in zip(found, (gained.dq, gained.dk, gained.dv), strict=True)]
        return Answer(whole.out, *found)

    return answer


def _one_rank_off(by: int) -> Callable[[Problem, Dealt], Answer]:
    def answer(problem: Problem, dealt: Dealt) -> Answer:
        whole = backward(problem, right_weights(problem))
        dk, dv = np.zeros_like(whole.dk), np.zeros_like(whole.dv)
        for rank, columns in enumerate(dealt.columns):
            theirs = dealt.columns[(rank + by) % dealt.size]
            count = min(len(columns), len(theirs))
            dk[:, :, list(columns[:count])] = whole.dk[:, :, list(theirs[:count])]
            dv[:, :, list(columns[:count])] = whole.dv[:, :, list(theirs[:count])]
        return Answer(whole.out, whole.dq, dk, dv)

    return answer


def _own_share(problem: Problem, dealt: Dealt) -> Answer:
    """dk and dv of a rank's own queries alone: nothing is carried home."""
    weights = right_weights(problem)
    whole = backward(problem, weights)
    delta = (problem.dout * whole.out).sum(-1, keepdims=True)
    own = backward(problem, weights * dealt.keys_of_hop(0, problem.k.shape[2]), delta)
    return Answer(whole.out, whole.dq, own.dk, own.dv)


DISEASES = (
    Disease(
        "softmax per chunk, summed over chunks",
        "the weights of a row sum to the number of chunks that it sees",
        _summed,
    ),
    Disease(
        "softmax per chunk, averaged over chunks",
        "weights sum to 1, but each chunk has the same share",
        lambda problem, dealt: _summed(problem, dealt) / dealt.size,
    ),
    Disease(
        "chunks weighed equally, as by an lse of zeros",
        "each chunk that a row sees has the same share",
        lambda problem, dealt: _mixed(problem, dealt, _if_seen),
    ),
    Disease(
        "chunks weighed by their largest score alone",
        "a chunk's share does not grow with the number of its keys",
        lambda problem, dealt: _mixed(problem, dealt, lambda s: np.max(s, axis=-1, keepdims=True)),
    ),
    Disease("sums that are not rescaled when the maximum grows", "early chunks weigh too much", _unscaled),
    Disease("sums that are not divided at the end", "weights sum to the row's own total", _undivided),
    Disease(
        "lse in base 2 taken for a natural one",
        "large chunks weigh too much",
        lambda problem, dealt: _mixed(problem, dealt, lambda s: _lse(s) / np.log(2)),
    ),
    Disease(
        "natural lse taken for one in base 2",
        "large chunks weigh too little",
        lambda problem, dealt: _mixed(problem, dealt, lambda s: _lse(s) * np.log(2)),
    ),
    Disease(
        "lse rounded to bfloat16",
        "shares of chunks are off by steps of up to 0.06 in their logarithm",
        lambda problem, dealt: _mixed(problem, dealt, lambda s: _bfloat16(_lse(s))),
    ),
    Disease(
        "a causal triangle in each hop", "every chunk is seen from the upper left corner on", _triangle_in_each_hop
    ),
    Disease("causal offset of a hop with the wrong sign", "later chunks are seen, earlier ones are not", _other_way),
    Disease("a diagonal one key too far", "each query sees the key after its own", _seen_by_shift(1)),
    Disease("a diagonal one key too short", "no query sees its own key", _seen_by_shift(-1)),
    Disease("causal, mask, window or documents ignored", "hidden keys have weights", _everything),
    Disease("documents, mask or window ignored beside causal", "all earlier keys have weights", _causal_alone),
    Disease("softcap ignored", "large scores are as large as without it", answer=_uncapped),
    Disease("sinks ignored", "weights sum to 1 beside a sink", lambda problem, dealt: _softmax(problem.scores)),
    Disease("no ring at all", "a query sees the keys of its own rank alone", _own_keys),
    Disease("length floored to a multiple of the ring", "the last keys have no weights", _floored),
    Disease("no scale at all", "weights are those of scores that were never multiplied", _scaled_by(lambda width: 1.0)),
    Disease("scale ignored, and its default taken", "weights are the default's", _scaled_by(lambda width: width**-0.5)),
    Disease("a finite sentinel for hidden keys", "rows that see nothing get the average of v", _averages),
    Disease("NaN in rows that see nothing", "a softmax over no key divides 0 by 0", answer=_nan_of(_unseeing)),
    Disease(
        "NaN where one hop shows a row nothing",
        "a chunk of which nothing is seen brings NaN to the merge",
        answer=_nan_of(_unseeing_in_a_hop),
    ),
    Disease("sinks counted once for each hop", "weights sum to less than with one sink", _sink_of_each_hop),
    Disease("grouped heads in the wrong order", "query head h reads key head h % Hk", answer=_heads_turned),
    Disease(
        "stale k and v in backward: a rank's own",
        "gradients of each hop are made with the rank's own k and v",
        answer=_stale(lambda size: 0),
    ),
    Disease(
        "stale k and v in backward: the last that visited",
        "gradients of each hop are made with one other's k and v",
        answer=_stale(lambda size: size - 1),
    ),
    Disease(
        "lse of a hop in backward",
        "gradients are those of chunks softmaxed by themselves",
        answer=_of_hops(True, False),
    ),
    Disease("out of a hop in backward", "delta is made of each hop's own out", answer=_of_hops(False, True)),
    Disease(
        "lse and out of a hop in backward",
        "gradients are those of each chunk alone, added up",
        answer=_of_hops(True, True),
    ),
    Disease(
        "dk and dv one rank off: of the next",
        "each rank has the gradients of the next one's keys",
        answer=_one_rank_off(1),
    ),
    Disease(
        "dk and dv one rank off: of the one before",
        "each rank has the gradients of the keys before",
        answer=_one_rank_off(-1),
    ),
    Disease(
        "dk and dv that are not carried home",
        "gradients of keys come from a rank's own queries alone",
        answer=_own_share,
    ),
)


def given_by(disease: Disease, problem: Problem, dealt: Dealt) -> Answer:
    """What an implementation with this disease gives; gradients that it says nothing about are those of its weights."""
    if disease.answer is not None:
        return disease.answer(problem, dealt)
    if disease.weights is None:
        raise ValueError(f"{disease.name!r} has neither weights nor an answer")
    return backward(problem, disease.weights(problem, dealt)).answer


def foretold(disease: Disease, problem: Problem, dealt: Dealt) -> Answer:
    """What is known of what an implementation with this disease gives.

    Of one whose weights are wrong that is out: its gradients are the derivative of what it computes where somebody
    derives it, and anything where they are written by hand.
    """
    given = given_by(disease, problem, dealt)
    return given if disease.answer is not None else Answer(given.out, None, None, None)
