"""Which disease an implementation has: the one that gives what it gave, wherever it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ringcore.testing.dense import Answer, before_cancelling, right, right_weights
from ringcore.testing.diseases import DISEASES, Disease, foretold
from ringcore.testing.problem import Dealt, Floats, Problem

NAMES = tuple(field.name for field in fields(Answer))
_LEAST = 0.5  # of a number due: gradients of problems that are told by numbers around 1 may be 0 but for rounding
_CANCELLED = 1 / 16  # of terms: rounding of right rings is 0.05 of what that allows, and all is as before but at 128
_SLIGHT = 0.01  # of rounding: where a mistake does as much to out, it may do more to gradients that it foretells not
_TOO_SMALL = 0.05  # root mean squares of what is due: such gradients are what is left of larger numbers
_SAID = 3  # questions of one diagnosis, in words
_GROWTH = 1.4  # of errors, from the smallest ring to one of 4 or more: a wide accumulator keeps below 1.2
UNKNOWN = Disease("not right, in no way that is known", "no known mistake gives the same numbers")
GROWING = Disease("precision falls as the ring grows", "what goes from hop to hop is as narrow as the inputs")


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
            scale = max(np.nanmax(np.abs(expected), initial=_LEAST), self.cancelled.get(name, 0.0))
            found[name] = float(np.nan_to_num(off, nan=np.inf, posinf=np.inf).max(initial=0.0) / scale)
        return found

    @cached_property
    def allowance(self) -> float:
        """How much larger rounding is than where scores are small: above 16, that of the scores is most of it."""
        return max(1.0, float(np.abs(np.where(self.problem.sees, self.problem.uncapped, 0.0)).max(initial=0.0)) / 16)

    @cached_property
    def cancelled(self) -> dict[str, float]:
        """What dq and dk are measured against, at least: where scores are large they are what is left of far more."""
        if self.allowance == 1:
            return {}
        return {name: _CANCELLED * size for name, size in before_cancelling(self.problem).items()}


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong.

    disease: the mistake, or UNKNOWN. sizes: the rings on which it shows. results: which of out, dq, dk, dv are wrong.
    error: the largest difference to what is right, over the largest number due. fit: that to what the disease gives.
    questions: on which it shows.
    """

    disease: Disease
    sizes: tuple[int, ...]
    results: tuple[str, ...] = ()
    error: float = np.inf
    fit: float = np.inf
    questions: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"on rings of {', '.join(map(str, self.sizes))}"
        if self.results:
            error = f"off by up to {self.error:.2g} of the largest number due"
            where = f"{', '.join(self.results)} {where}, {error}"
        if self.disease is UNKNOWN and self.questions:  # nothing else says what to look at
            some = ", ".join(f'"{name}"' for name in self.questions[:_SAID])
            where += f", where asked {some}{f' and {more} more' if (more := len(self.questions) - _SAID) > 0 else ''}"
        return f"{self.disease.name}: {self.disease.evidence} ({where})"


def diagnose(observations: Sequence[Observation], tolerance: float = 1e-3) -> list[Diagnosis]:
    """The mistakes that explain what was observed; none if all of it is right.

    tolerance: differences over the largest number due that are rounding, where scores are below 16. Of mistakes that
    nothing observed can tell apart, such as a shift by one rank in either direction on a ring of two, all are given;
    one that explains a part of what another does is not. What a mistake does not touch, and is wrong all the same, is
    explained by a further one.
    """
    due = {id(each.problem): right(each.problem) for each in observations}
    wrong = [
        (each, name, error)
        for each in observations
        for name, error in each.differences(due[id(each.problem)]).items()
        if not error < tolerance * each.allowance
    ]
    if not wrong:
        return []
    told = _most_telling([_fit(disease, observations, due, tolerance) for disease in DISEASES])
    if not told:
        return _one_by_one(observations, due, tolerance, wrong)
    explained = set[int]().union(*(each.touched for each in told))
    rest = diagnose([each for each in observations if id(each) not in explained], tolerance)
    return [_told_of(each, wrong) for each in told] + rest


def _one_by_one(
    observations: Sequence[Observation],
    due: dict[int, Answer],
    tolerance: float,
    wrong: Sequence[tuple[Observation, str, float]],
) -> list[Diagnosis]:
    """Of several mistakes at once those that are alone in some questions, and that the rest is unknown.

    What explains all questions of a kind need not explain those of others, in which another mistake is made too.
    """
    found, left, amiss = list[Diagnosis](), list(observations), {id(each) for each, _, _ in wrong}
    for alone in _ALONE:
        kind, others = [each for each in left if alone(each)], [each for each in left if not alone(each)]
        fits = [_fit(disease, kind, due, tolerance) for disease in DISEASES]
        told = _most_telling([each.with_others(others, due, tolerance) for each in fits if each.shows & amiss])
        found += [_told_of(each, wrong) for each in told]
        explained = set[int]().union(*(each.touched for each in told))
        left = [each for each in left if id(each) not in explained]
    rest = [line for line in wrong if any(each is line[0] for each in left)]
    return found + ([_told(UNKNOWN, rest, np.inf)] if rest else [])


def _keywords(problem: Problem) -> set[str]:
    """What a question asks beside attention itself."""
    others = {
        "scale": not np.isclose(problem.scale, problem.q.shape[3] ** -0.5), "softcap": problem.softcap is not None,
        "sinks": problem.sinks is not None, "prefix": problem.before > 0, "grouped": problem.group > 1,
    }  # fmt: skip
    return {*problem.shown, *problem.added, *(name for name, there in others.items() if there)}


# Kinds of questions in which few mistakes can be made: merges alone, then causal ones, then all but merges.
_ALONE: tuple[Callable[[Observation], bool], ...] = (
    lambda each: not _keywords(each.problem),
    lambda each: _keywords(each.problem) == {"causal"},
    lambda each: each.dealt.size == 1,
)


def growing(observations: Iterable[Observation]) -> list[Diagnosis]:
    """Whether errors of half types grow with the ring, where none is too large by itself.

    Root mean squares over all questions that every ring answered, since one error says little: a sum that is rounded
    to the inputs' type at every hop has about twice the error on a ring of 4 that it has alone.
    """
    squares = dict[tuple[str, int], dict[str, float]]()
    for each in observations:
        due = right(each.problem)
        for name, came in each.given.items():
            expected = getattr(due, name)
            scale = np.square(expected).mean()
            if scale > _TOO_SMALL**2:
                error = float(np.square(came - expected).mean() / scale)
                squares.setdefault((name, each.dealt.size), {})[each.name] = error
    sizes, told = sorted({size for _, size in squares}), list[str]()
    if len(sizes) < 2 or sizes[-1] < 4 or sizes[0] > 2:
        return []
    for name in NAMES:
        of_size = [squares.get((name, size), {}) for size in sizes]
        common = set.intersection(*map(set, of_size))
        errors = [float(np.sqrt(np.mean([each[question] for question in common] or [0.0]))) for each in of_size]
        if errors[-1] > _GROWTH * errors[0] > 0 and all(b > 0.95 * a for a, b in pairwise(errors)):
            told.append(name)
    largest = max((x**0.5 for (name, _), of in squares.items() if name in told for x in of.values()), default=0.0)
    return [Diagnosis(GROWING, tuple(sizes), tuple(told), largest)] if told else []


def _told(disease: Disease, wrong: Sequence[tuple[Observation, str, float]], fit: float) -> Diagnosis:
    sizes = tuple(sorted({each.dealt.size for each, _, _ in wrong}))
    results = tuple(name for name in NAMES if name in {name for _, name, _ in wrong})
    questions = tuple(dict.fromkeys(each.name for each, _, _ in wrong if each.name))
    return Diagnosis(disease, sizes, results, max((error for *_, error in wrong), default=0.0), fit, questions)


def _told_of(fit: _Fit, wrong: Sequence[tuple[Observation, str, float]]) -> Diagnosis:
    return _told(fit.disease, [line for line in wrong if id(line[0]) in fit.shows], fit.off)


class _Fit(NamedTuple):
    """How a disease fits: the largest difference to what it gives, which observations, by id, it touches, and where
    that is more than rounding.
    """

    disease: Disease
    off: float
    touched: set[int]
    shows: set[int]

    def says_more_than(self, other: _Fit) -> bool:
        """Whether it explains all that the other does, and more, or as much if the other is rare."""
        return other.shows < self.shows or (other.disease.rare and not self.disease.rare and other.shows == self.shows)

    def with_others(self, others: Sequence[Observation], due: dict[int, Answer], tolerance: float) -> _Fit:
        """The same, with those of other observations that it fits as well."""
        more = [_fit(self.disease, [each], due, tolerance) for each in others]
        return _Fit(
            self.disease,
            max([self.off, *(each.off for each in more if each.touched)]),
            self.touched.union(*(each.touched for each in more)),
            self.shows.union(*(each.shows for each in more)),
        )


def _most_telling(fits: Sequence[_Fit]) -> list[_Fit]:
    """Those that show, but for those of which another says more."""
    shown = [each for each in fits if each.shows]
    return [each for each in shown if not any(other.says_more_than(each) for other in shown)]


def _fit(
    disease: Disease, observations: Sequence[Observation], right_answers: dict[int, Answer], tolerance: float
) -> _Fit:
    """It fits nowhere, if anything that it touches is not what it gives."""
    found = _Fit(disease, 0.0, set(), set())
    for each in observations:
        due, allowed = foretold(disease, each.problem, each.dealt), tolerance * each.allowance
        told = {name: x for name in each.given if (x := getattr(due, name)) is not None}
        if not told:  # nothing is known of what it gives here
            found.touched.add(id(each))
            continue
        effects = list(replace(each, given=told).differences(right_answers[id(each.problem)]).values())
        if disease.weights is not None:  # which may be wrong where out is not: where all rows of v are alike
            there = disease.weights(each.problem, each.dealt)
            effects.append(float(np.abs(there - right_weights(each.problem)).max(initial=0.0)))
        effect = max(effects, default=0.0)
        if effect < _SLIGHT * allowed:
            continue
        off = max(each.differences(due).values(), default=0.0)
        if not off < allowed:
            return _Fit(disease, np.inf, set(), set())
        found = found._replace(off=max(found.off, off))
        found.touched.add(id(each))
        if not effect < allowed:
            found.shows.add(id(each))
    return found
