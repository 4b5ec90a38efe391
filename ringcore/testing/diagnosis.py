"""Which disease an implementation has: the one that gives what it gave, wherever it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ringcore.testing.diseases import DISEASES, Answer, Disease, given_by, right
from ringcore.testing.problem import Dealt, Floats, Problem

NAMES = tuple(field.name for field in fields(Answer))
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
            scale = np.nanmax(np.abs(expected), initial=1e-30)
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
    """The mistakes that explain everything that was observed; none if all of it is right.

    tolerance: differences over the largest number due that are rounding. Of mistakes that nothing observed can tell
    apart, such as a shift by one rank in either direction on a ring of two, all are given.
    """
    wrong = [
        (each, name, error)
        for each in observations
        for name, error in each.differences(right(each.problem)).items()
        if not error < tolerance
    ]
    if not wrong:
        return []
    sizes = tuple(sorted({each.dealt.size for each, _, _ in wrong}))
    results = tuple(name for name in NAMES if name in {name for _, name, _ in wrong})
    error = max(error for *_, error in wrong)
    fits = [(disease, _fit(disease, observations)) for disease in DISEASES]
    return [Diagnosis(disease, sizes, results, error, fit) for disease, fit in fits if fit < tolerance] or [
        Diagnosis(UNKNOWN, sizes, results, error, min(fit for _, fit in fits))
    ]


def _fit(disease: Disease, observations: Sequence[Observation]) -> float:
    """The largest difference to what the disease gives."""
    found = [each.differences(given_by(disease, each.problem, each.dealt)) for each in observations]
    return max((error for differences in found for error in differences.values()), default=np.inf)
