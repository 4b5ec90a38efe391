"""Which disease an implementation has: the one that gives what it gave, wherever it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ringcore.testing.diseases import DISEASES, Answer, Disease, foretold, right, right_weights
from ringcore.testing.problem import Dealt, Floats, Problem

NAMES = tuple(field.name for field in fields(Answer))
_LEAST = 0.5  # of a number due: gradients of problems that are told by numbers around 1 may be 0 but for rounding
UNKNOWN = Disease("not right, in no way that is known", "no known mistake gives the same numbers")


@dataclass(frozen=True)
class Observation:
    """What an implementation gave for a problem over a ring: out, dq, dk and dv, as far as they were asked for."""

    problem: Problem
    dealt: Dealt
    given: dict[str, Floats]
    name: str = ""

    def differences(self, due: Answer) -> dict[str, float]:
        """Of each result, the largest difference over the largest number due; infinite where just one is NaN.

        Results of which nothing is known are left out.
        """
        found = {}
        for name, came in self.given.items():
            expected = getattr(due, name)
            if expected is None:
                continue
            both = np.isnan(came) & np.isnan(expected)
            off = np.where(both, 0.0, np.abs(came - expected))
            scale = np.nanmax(np.abs(expected), initial=_LEAST)
            found[name] = float(np.nan_to_num(off, nan=np.inf, posinf=np.inf).max(initial=0.0) / scale)
        return found


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong.

    disease: the mistake, or UNKNOWN. sizes: the rings on which it shows. results: which of out, dq, dk, dv are wrong.
    error: the largest difference to what is right, over the largest number due. fit: that to what the disease gives.
    """

    disease: Disease
    sizes: tuple[int, ...]
    results: tuple[str, ...]
    error: float
    fit: float


def diagnose(observations: Sequence[Observation], tolerance: float = 1e-3) -> list[Diagnosis]:
    """The mistakes that explain what was observed; none if all of it is right.

    tolerance: differences over the largest number due that are rounding. Of mistakes that nothing observed can tell
    apart, such as a shift by one rank in either direction on a ring of two, all are given. What a mistake does not
    touch, and is wrong all the same, is explained by another one.
    """
    wrong = [
        (each, name, error)
        for each in observations
        for name, error in each.differences(right(each.problem)).items()
        if not error < tolerance
    ]
    if not wrong:
        return []
    found, touched = list[Diagnosis](), set[int]()
    for disease in DISEASES:
        fit, shows = _fit(disease, observations, tolerance)
        if fit < tolerance and shows:
            touched |= shows
            found.append(_told(disease, [line for line in wrong if id(line[0]) in shows], fit))
    rest = [each for each in observations if id(each) not in touched]
    if not found:
        return [_told(UNKNOWN, wrong, np.inf)]
    return found + diagnose(rest, tolerance)


def _told(disease: Disease, wrong: Sequence[tuple[Observation, str, float]], fit: float) -> Diagnosis:
    sizes = tuple(sorted({each.dealt.size for each, _, _ in wrong}))
    results = tuple(name for name in NAMES if name in {name for _, name, _ in wrong})
    return Diagnosis(disease, sizes, results, max(error for *_, error in wrong), fit)


def _fit(disease: Disease, observations: Sequence[Observation], tolerance: float) -> tuple[float, set[int]]:
    """The largest difference to what the disease gives, and on which observations, by id, it is not what is right."""
    largest, shows = 0.0, set[int]()
    for each in observations:
        due, healthy = foretold(disease, each.problem, each.dealt), right(each.problem)
        largest = max(largest, *each.differences(due).values(), 0.0)
        told = {name: x for name in each.given if (x := getattr(due, name)) is not None}
        off = list(replace(each, given=told).differences(healthy).values())
        if disease.weights is not None:  # which may be wrong where out is not: where all rows of v are alike
            off.append(float(np.abs(disease.weights(each.problem, each.dealt) - right_weights(each.problem)).max()))
        if any(not error < tolerance for error in off):
            shows.add(id(each))
    return largest, shows
