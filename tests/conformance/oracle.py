"""The truth that calls are held against: dense attention in float64, with the scales that errors are measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ringcore.testing.dense import backward, lse_of, right_weights
from ringcore.testing.meaning import problem_of


@dataclass(frozen=True)
class Truth:
    """What a call must give, and the scales that its errors are measured against."""

    out: np.ndarray
    lse: np.ndarray
    gradients: dict[str, np.ndarray]
    largest_logit: float
    row_scale: np.ndarray  # the largest |v| that each row sees, [B, H, S, 1]


def dense(q, k, v, keywords: dict[str, Any], dout, dlse) -> Truth:
    """The truth for arrays [B, H, S, D] of any float dtype, as they are after rounding to it."""
    problem = problem_of({"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse}, keywords)
    whole = backward(problem, right_weights(problem))
    lse, before = lse_of(problem.scores, problem.sinks), problem.before
    gradients = {"q": whole.dq}
    for name, x in (("k", whole.dk), ("v", whole.dv)):
        gradients[f"prefix_{name}"], gradients[name] = np.split(x, [before], axis=2)
    if problem.sinks is not None:
        # A sink is one more key, which all of its head see, and whose value is 0.
        share = np.where(
            np.isneginf(lse), 0.0, np.exp(problem.sinks[:, None, None] - np.where(np.isneginf(lse), 0.0, lse))
        )
        delta = (problem.dout * whole.out).sum(-1, keepdims=True) - problem.dlse
        gradients["sinks"] = -(share * delta).sum((0, 2, 3))
    if (bias := keywords.get("bias")) is not None:
        gradients["bias"] = summed(whole.dscores[..., before:], np.shape(bias))
    seen = ~np.isneginf(problem.scores)
    largest = float(np.abs(np.where(seen, problem.uncapped, 0.0)).max(initial=0.0))
    width = np.abs(problem.of_heads(problem.v)).max(-1)[:, :, None, :]
    return Truth(whole.out, lse[..., 0], gradients, largest, (seen * width).max(-1, keepdims=True, initial=0.0))


def summed(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of what was broadcast from this shape."""
    padded = (1,) * (4 - len(shape)) + shape
    axes = tuple(i for i in range(4) if padded[i] == 1)
    return gradient.sum(axes, keepdims=True).reshape(shape)
