"""What came of asking: mistakes by name, faults that are none of numbers, and the weights that were read off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ringcore.testing.dense import right, right_weights
from ringcore.testing.diagnosis import Diagnosis, Observation, diagnose, growing
from ringcore.testing.diseases import Disease
from ringcore.testing.problem import Floats

TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
SUMS = "v of ones, so that out is the sum of weights"
WEIGHTS = "v of 0 and 1, so that out is the weights"
HANG, ENDED, RAISED = "no answer in time", "the process ended", "raised"
NO_ARRAY = "no array"
SHAPE, DTYPE, WRITTEN, UNSTEADY = "wrong shape", "wrong dtype", "inputs written to", "not the same twice"
OTHER_RANKS = ", in a group of other ranks"  # of a question that was asked so

HARD_CODED = Disease("the dtype of gradients is hard-coded", "gradients come in another dtype than their inputs")
ODD = Disease("odd rings wait for ever", "no answer on rings of an odd number of ranks alone")
GLOBAL = Disease(
    "a global rank used for a group's rank", "wrong in a group that is not all processes, and right in one"
)


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer, apart from its numbers: on which question and ring, and what happened.

    kind: HANG, ENDED, RAISED, NO_ARRAY, SHAPE, DTYPE, WRITTEN or UNSTEADY. unanswered: whether there was no answer.
    """

    question: str
    size: int
    words: str
    kind: str = RAISED
    unanswered: bool = False


@dataclass(frozen=True)
class Report:
    """What came of all questions.

    asked: how many. errors: the largest difference of each result to what is right, over the largest number due, by
    (question, ring size, result). diagnoses: mistakes that explain them. faults: what else was wrong. sums: by
    ring size, the sum of each row's weights, head by head, which is 1. weights: by ring size, those of the question
    that reads them off [H, S, N]; due_weights: what they should be.
    """

    asked: int
    errors: dict[tuple[str, int, str], float]
    diagnoses: tuple[Diagnosis, ...]
    faults: tuple[Fault, ...]
    sums: dict[int, tuple[float, ...]] = field(default_factory=dict)
    weights: dict[int, Floats] = field(default_factory=dict)
    due_weights: Floats | None = None

    @property
    def right(self) -> bool:
        """Whether nothing was wrong."""
        return not self.diagnoses and not self.faults

    def __str__(self) -> str:
        if self.right:
            largest = max(self.errors.values(), default=0.0)
            return f"right in all {self.asked} answers; the largest error is {largest:.1e} of the largest number due"
        lines = [str(each) for each in self.diagnoses]
        off = {size: each for size, each in self.sums.items() if not max(abs(x - 1) for x in each) < 0.01}
        if off:
            said = (f"{min(each):.3g} to {max(each):.3g} on a ring of {size}" for size, each in off.items())
            lines.append(f"the weights of a row sum to {', '.join(said)}; they should to 1")
        lines += [f"{each.question}, ring of {each.size}: {each.words}" for each in self.faults]
        return "\n".join(lines)


def report_of(observations: Sequence[Observation], faults: Sequence[Fault], dtype: str) -> Report:
    """What the answers in this dtype say."""
    errors = {
        (each.name, each.dealt.size, result): error
        for each in observations
        for result, error in each.differences(right(each.problem)).items()
    }
    count = len(observations) + sum(fault.unanswered for fault in faults)
    ordinary = [each for each in observations if not each.name.endswith(OTHER_RANKS)]
    diagnoses = diagnose(ordinary, TOLERANCES[dtype])
    if dtype in ("float16", "bfloat16") and not diagnoses:
        diagnoses = growing(ordinary)
    if not diagnoses:
        diagnoses = _among_other_ranks(observations, faults, dtype)
    diagnoses += _odd(ordinary, faults) + _hard_coded(faults)
    sums = {
        each.dealt.size: tuple(each.given["out"].mean(-1).ravel().tolist())
        for each in observations
        if each.name == SUMS and "out" in each.given
    }
    read = next((each for each in ordinary if each.name.startswith(WEIGHTS)), None)
    due_weights = None if read is None else right_weights(read.problem)[0]
    return Report(count, errors, tuple(diagnoses), tuple(faults), sums, _weights(ordinary), due_weights)


def _weights(observations: Sequence[Observation]) -> dict[int, Floats]:
    """The weights that were read off, of ring sizes where all of them were."""
    parts = dict[int, list[Floats]]()
    for each in observations:
        if each.name.startswith(WEIGHTS) and "out" in each.given:
            parts.setdefault(each.dealt.size, []).append(each.given["out"][0])
    keys = next((each.problem.positions for each in observations), 0)
    found = {size: np.concatenate(some, axis=-1)[..., :keys] for size, some in parts.items()}
    return {size: each for size, each in found.items() if each.shape[-1] == keys}


def _hard_coded(faults: Sequence[Fault]) -> list[Diagnosis]:
    """Whether gradients come in another dtype than what they are gradients of, and out in its own."""
    found = [(fault.size, *re.findall(r"\b(out|d[qkv]) is ", fault.words)) for fault in faults if fault.kind == DTYPE]
    names = {name for _, *rest in found for name in rest}
    if not names or "out" in names:
        return []
    return [Diagnosis(HARD_CODED, tuple(sorted({size for size, *_ in found})), tuple(sorted(names)))]


def _odd(observations: Sequence[Observation], faults: Sequence[Fault]) -> list[Diagnosis]:
    """Whether rings of an odd size alone hang, of which that of one rank says nothing."""
    hung = tuple(sorted({fault.size for fault in faults if fault.kind == HANG}))
    answered = {each.dealt.size for each in observations}
    even = any(size % 2 == 0 for size in answered)
    odd = max(hung, default=0) > 1 and all(size % 2 for size in hung)
    return [Diagnosis(ODD, hung)] if odd and even and not {*hung} & answered else []


def _among_other_ranks(observations: Sequence[Observation], faults: Sequence[Fault], dtype: str) -> list[Diagnosis]:
    """Whether it fails where the ranks of its group are not those of all processes, and only there."""
    there = [each for each in observations if each.name.endswith(OTHER_RANKS)]
    wrong = {each.dealt.size for each in there if diagnose([each], TOLERANCES[dtype])}
    wrong |= {fault.size for fault in faults if fault.question.endswith(OTHER_RANKS)}
    elsewhere = {fault.size for fault in faults if not fault.question.endswith(OTHER_RANKS)}
    told = tuple(sorted(wrong - elsewhere))
    return [Diagnosis(GLOBAL, told)] if told else []
