"""Dense attention in float64, written from the definition: one softmax over one full matrix of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ringcore.testing.problem import Floats, Problem


@dataclass(frozen=True)
class Answer:
    """What attention gives: out [B, H, S, E], and the gradients of q, k and v [B, H or Hk, S or N, D or E].

    None is unknown.
    """

    out: Floats | None
    dq: Floats | None
    dk: Floats | None
    dv: Floats | None


class Whole(NamedTuple):
    """All that comes of certain weights.

    dk, dv: with those of a prefix, which come first. dscores: the gradient of scores behind softcap and bias.
    """

    out: Floats
    dq: Floats
    dk: Floats
    dv: Floats
    dscores: Floats
    before: int

    @property
    def answer(self) -> Answer:
        """What is asked for, without the gradients of a prefix."""
        return Answer(self.out, self.dq, self.dk[:, :, self.before :], self.dv[:, :, self.before :])


def right(problem: Problem) -> Answer:
    """Out and gradients by the definition."""
    return backward(problem, right_weights(problem)).answer


def right_weights(problem: Problem) -> Floats:
    """One softmax over all keys, [B, H, S, N]; 0 for a query that sees none."""
    return softmax(problem.scores, problem.sinks)


def backward(problem: Problem, weights: Floats, delta: Floats | None = None) -> Whole:
    """Out and gradients of attention that weighs so; ``delta`` [B, H, S, 1] is rowsum(dout * out) - dlse if not given.

    By the chain rule through the whole matrix of weights.
    """
    v = problem.of_heads(problem.v)
    left = weights * problem.kept
    out = left @ v
    if delta is None:
        delta = (problem.dout * out).sum(-1, keepdims=True) - problem.dlse
    dscores = weights * (problem.kept * (problem.dout @ np.swapaxes(v, -1, -2)) - delta)
    draw = dscores * problem.slope * problem.scale
    return Whole(
        out,
        draw @ problem.of_heads(problem.k),
        folded(problem, np.swapaxes(draw, -1, -2) @ problem.q),
        folded(problem, np.swapaxes(left, -1, -2) @ problem.dout),
        dscores,
        problem.before,
    )


def before_cancelling(problem: Problem) -> dict[str, float]:
    """The largest of dq and dk, were no two terms of their sums of unlike sign: their rounding is a part of that."""
    weights, v = right_weights(problem), np.abs(problem.of_heads(problem.v))
    dleft = weights * problem.kept * (np.abs(problem.dout) @ np.swapaxes(v, -1, -2))
    draw = (dleft + weights * dleft.sum(-1, keepdims=True)) * problem.slope * problem.scale
    dq = draw @ np.abs(problem.of_heads(problem.k))
    dk = folded(problem, np.swapaxes(draw, -1, -2) @ np.abs(problem.q))
    return {"dq": float(dq.max(initial=0.0)), "dk": float(dk.max(initial=0.0))}


def folded(problem: Problem, x: Floats) -> Floats:
    """The sum over the query heads of each key head."""
    batch, heads, *rest = x.shape
    return np.asarray(x.reshape(batch, heads // problem.group, problem.group, *rest).sum(2))


def softmax(scores: Floats, sinks: Floats | None = None, times: Floats | float = 1.0) -> Floats:
    """Of the last axis, 0 where all is -inf; sinks [H] are in the denominator, so many ``times``."""
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    reference = np.where(np.isneginf(top), 0.0, top)
    power = np.exp(scores - reference)
    total = power.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + times * np.exp(sinks[:, None, None] - reference)
    return np.asarray(power / np.where(total > 0, total, 1.0))


def lse_of(scores: Floats, sinks: Floats | None = None) -> Floats:
    """The logarithm of the sum of the exponentials of the last axis and of sinks [H], [B, H, S, 1]; -inf of none."""
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    reference = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores - reference).sum(-1, keepdims=True)) + reference
    return np.asarray(lse if sinks is None else np.logaddexp(lse, sinks[:, None, None]))
