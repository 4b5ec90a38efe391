"""What mistakes give that weights alone do not say: NaN, lost rows, heads mixed up, and gradients gone wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ringcore.testing.dense import Answer, backward, lse_of, right, right_weights, softmax
from ringcore.testing.problem import Bools, Dealt, Floats, Problem
from ringcore.testing.wrong_weights import branch_scores, hops, met

Answers = Callable[[Problem, Dealt], Answer]
_OVERFLOW = float(np.log(np.finfo(np.float32).max))


def uncapped(problem: Problem, dealt: Dealt) -> Answer:
    """No softcap."""
    return right(replace(problem, softcap=None))


def rows_with(value: float, lost: Callable[[Problem, Dealt], Bools]) -> Answers:
    """``value`` in the rows that ``lost`` [B, H, S, 1] says; then nothing is said of gradients."""

    def answer(problem: Problem, dealt: Dealt) -> Answer:
        due = backward(problem, right_weights(problem))
        rows = np.broadcast_to(lost(problem, dealt), (*problem.q.shape[:3], 1))
        return Answer(np.where(rows, value, due.out), None, None, None) if rows.any() else due.answer

    return answer


def unseeing(problem: Problem, dealt: Dealt) -> Bools:
    """Rows that see nothing."""
    return np.asarray(np.isneginf(problem.scores).all(-1, keepdims=True))


def unseeing_hops(problem: Problem, dealt: Dealt) -> Floats:
    """[B, H, S, 1]: in how many hops each row sees nothing."""
    empty = [np.isneginf(scores).all(-1, keepdims=True) for scores in hops(problem, dealt)]
    return np.asarray(np.sum(empty, axis=0), np.float64)


def infinite_lse(problem: Problem, dealt: Dealt) -> Answer:
    """+inf as the lse of a hop in which a row sees nothing: that hop's 0 replaces all; two of them are NaN."""
    empty = unseeing_hops(problem, dealt)
    if not empty.any():
        return right(problem)
    out = np.where(empty == 0, backward(problem, right_weights(problem)).out, np.where(empty == 1, 0.0, np.nan))
    return Answer(out, None, None, None)


def overflows(problem: Problem, dealt: Dealt) -> Bools:
    """Rows in which a chunk is so far above those before it that exp of the gap is infinite in float32."""
    lse, lost = np.full((*problem.q.shape[:3], 1), -np.inf), np.zeros((*problem.q.shape[:3], 1), bool)
    for scores in hops(problem, dealt):
        own = lse_of(scores)
        lost |= np.isfinite(lse) & (own - np.where(np.isfinite(lse), lse, 0.0) > _OVERFLOW)
        lse = np.logaddexp(lse, own)
    return lost


def heads_turned(problem: Problem, dealt: Dealt) -> Answer:
    """Query head h reads key head h % Hk."""
    order = np.arange(problem.q.shape[1]) % problem.k.shape[1]
    turned = replace(problem, k=problem.k[:, order], v=problem.v[:, order])
    return Answer(right_weights(turned) @ turned.v, None, None, None)


def heads_attended(problem: Problem, dealt: Dealt) -> Answer:
    """Heads taken for positions: at each position a softmax over heads; of masks nothing is said."""
    if problem.shown.keys() - {"causal"} or problem.added or problem.sinks is not None or problem.before:
        return Answer(None, None, None, None)
    heads = problem.q.shape[1]
    k, v = problem.of_heads(problem.k), problem.of_heads(problem.v)
    q, k, v, dout = (np.swapaxes(x, 1, 2) for x in (problem.q, k, v, problem.dout))
    shown: dict[str, Bools] = {"causal": np.tri(heads, dtype=np.bool_)} if problem.shown else {}
    due = right(Problem(q, k, v, dout, problem.scale, shown, softcap=problem.softcap))
    return Answer(None if due.out is None else np.swapaxes(due.out, 1, 2), None, None, None)


def mixture_kept_constant(problem: Problem, dealt: Dealt) -> Answer:
    """Dilated attention whose branches have their share by lse, and no gradient passes through it."""
    if not problem.dilation:
        return right(problem)
    found = backward(problem, right_weights(problem))
    total = lse_of(problem.scores, problem.sinks)
    dq, dk = np.zeros_like(found.dq), np.zeros_like(found.dk)
    for scores in branch_scores(problem):
        own = lse_of(scores)
        share = np.where(np.isneginf(own), 0.0, np.exp(own - np.where(np.isneginf(total), 0.0, total)))
        gained = backward(replace(problem, dout=problem.dout * share), softmax(scores))
        dq, dk = dq + gained.dq, dk + gained.dk
    return found._replace(dq=dq, dk=dk).answer


def stale(hop_of: Callable[[int], int]) -> Answers:
    """Gradients of every hop made with k and v of one and the same."""

    def answer(problem: Problem, dealt: Dealt) -> Answer:
        whole = backward(problem, right_weights(problem))
        lse = lse_of(problem.scores, problem.sinks)
        lse = np.where(np.isneginf(lse), 0.0, lse)
        delta = (problem.dout * whole.out).sum(-1, keepdims=True) - problem.dlse
        dq, dk, dv = np.zeros_like(whole.dq), np.zeros_like(whole.dk), np.zeros_like(whole.dv)
        for rank, rows in enumerate(dealt.rows):
            shards = [[problem.before + column for column in columns] for columns in dealt.columns]
            mine, k, v = shards[(rank - hop_of(dealt.size)) % dealt.size], problem.k.copy(), problem.v.copy()
            known = np.ones(k.shape[2], bool)
            for theirs in shards:
                if len(theirs) == len(mine):
                    k[:, :, theirs], v[:, :, theirs] = problem.k[:, :, mine], problem.v[:, :, mine]
                else:
                    known[theirs] = False
            told = replace(problem, k=k, v=v).showing(known=known[problem.before :])
            weights = np.exp(told.scores - lse) * np.isin(np.arange(problem.q.shape[2]), rows)[:, None]
            gained = backward(told, weights, delta)
            dq, dk, dv = dq + gained.dq, dk + gained.dk, dv + gained.dv
        return whole._replace(dq=dq, dk=dk, dv=dv).answer

    return answer


def of_hops(local_lse: bool, local_out: bool) -> Answers:
    """Gradients with statistics of a hop in place of the finished row's."""

    def answer(problem: Problem, dealt: Dealt) -> Answer:
        final = right_weights(problem)
        whole = backward(problem, final)
        found = [np.zeros_like(x) for x in (whole.dq, whole.dk, whole.dv)]
        for scores in hops(problem, dealt):
            own = softmax(scores)
            weights = own if local_lse else np.where(np.isneginf(scores), 0.0, final)
            out = own @ problem.of_heads(problem.v) if local_out else whole.out
            gained = backward(problem, weights, (problem.dout * out).sum(-1, keepdims=True))
            found = [x + y for x, y in zip(found, (gained.dq, gained.dk, gained.dv), strict=True)]
        return whole._replace(dq=found[0], dk=found[1], dv=found[2]).answer

    return answer


def one_rank_off(by: int) -> Answers:
    """dk and dv of another rank's keys."""

    def answer(problem: Problem, dealt: Dealt) -> Answer:
        due = right(problem)
        turned = []
        for whole in (due.dk, due.dv):
            found = np.zeros_like(whole)
            for rank, columns in enumerate(dealt.columns):
                theirs = dealt.columns[(rank + by) % dealt.size]
                count = min(len(columns), len(theirs))
                found[:, :, list(columns[:count])] = whole[:, :, list(theirs[:count])]  # type: ignore[index]
            turned.append(found)
        return replace(due, dk=turned[0], dv=turned[1])

    return answer


def added_up(problem: Problem, dealt: Dealt) -> Answer:
    """A rank's dk and dv added up for dk, and those of the next for dv: what two ranks sent is taken for the pair.

    Only where every rank holds as many keys, and k is as wide as v.
    """
    due = right(problem)
    if due.dk is None or due.dv is None or dealt.size == 1 or len({len(columns) for columns in dealt.columns}) > 1:
        return due
    both, after = due.dk + due.dv, np.zeros_like(due.dv)
    for mine, theirs in zip(dealt.columns, (*dealt.columns[1:], dealt.columns[0]), strict=True):
        after[:, :, list(mine)] = both[:, :, list(theirs)]
    return replace(due, dk=both, dv=after)


def own_share(problem: Problem, dealt: Dealt) -> Answer:
    """dk and dv of a rank's own queries alone: nothing is carried home."""
    weights = right_weights(problem)
    whole = backward(problem, weights)
    delta = (problem.dout * whole.out).sum(-1, keepdims=True) - problem.dlse
    own = backward(problem, weights * met(problem, dealt, 0), delta)
    return whole._replace(dk=own.dk, dv=own.dv).answer


def no_delta(problem: Problem, dealt: Dealt) -> Answer:
    """Gradients of weights that are not normalised: the term that says so is missing."""
    weights = right_weights(problem)
    return backward(problem, weights, np.zeros((*problem.q.shape[:3], 1))).answer
