"""Ask an implementation of attention what attention gives, on several rings, and say what is wrong with its answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ringcore.testing.diagnosis import Diagnosis, Observation, diagnose
from ringcore.testing.diseases import right
from ringcore.testing.libraries import Library, library_of
from ringcore.testing.problem import Bools, Dealt, Floats, Problem, Question

LENGTH, WIDTH = 22, 8  # a length that rings of 3 and 4 do not divide
ACCEPTS = ("causal", "grouped", "window", "scale", "softcap", "mask", "documents", "sinks")
SUMS = "v of ones, so that out is the sum of weights"
TOLERANCES = {"float64": 1e-9, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer, apart from its numbers: on which question and ring, and what happened.

    unanswered: whether there was none.
    """

    question: str
    size: int
    words: str
    unanswered: bool = False


@dataclass(frozen=True)
class Report:
    """What came of all questions.

    asked: how many. errors: the largest difference of each result to what is right, over the largest number due, by
    (question, ring size, result). diagnoses: mistakes that explain them. faults: what else was wrong. sums: by
    ring size, the sum of each row's weights, head by head, which is 1.
    """

    asked: int
    errors: dict[tuple[str, int, str], float]
    diagnoses: tuple[Diagnosis, ...]
    faults: tuple[Fault, ...]
    sums: dict[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether nothing was wrong."""
        return not self.diagnoses and not self.faults

    def __str__(self) -> str:
        if self.right:
            largest = max(self.errors.values(), default=0.0)
            return f"right in all {self.asked} answers; the largest error is {largest:.1e} of the largest number due"
        lines = [
            f"{each.disease.name}: {each.disease.evidence} ({', '.join(each.results)} on rings of "
            f"{', '.join(map(str, each.sizes))}, off by up to {each.error:.2g} of the largest number due)"
            for each in self.diagnoses
        ]
        off = {size: each for size, each in self.sums.items() if not max(abs(x - 1) for x in each) < 0.01}
        if off:
            said = (f"{min(each):.3g} to {max(each):.3g} on a ring of {size}" for size, each in off.items())
            lines.append(f"the weights of a row sum to {', '.join(said)}; they should to 1")
        lines += [f"{each.question}, ring of {each.size}: {each.words}" for each in self.faults]
        return "\n".join(lines)


def questions(accepts: Collection[str] = (), length: int = LENGTH, seed: int = 0) -> Iterator[Question]:
    """What is asked of an implementation that takes these keywords beside q, k and v, about so many positions."""
    rows, columns = np.arange(length)[:, None], np.arange(length)[None, :]
    everything, causal = np.ones((length, length), bool), columns <= rows
    documents = np.repeat([0, 1, 2], [length // 4, length // 2, length - length // 4 - length // 2])
    hidden = everything.copy()
    hidden[:, ::3] = False
    hidden[4] = False

    yield Question("all keys", _problem(seed, everything))
    plain = _problem(seed, everything)
    yield Question(SUMS, replace(plain, v=np.ones_like(plain.v)))
    if "causal" in accepts:
        yield Question("causal", _problem(seed + 1, causal), {"causal": True})
    if "grouped" in accepts:
        told = {"causal": True} if "causal" in accepts else {}
        yield Question("grouped heads", _problem(seed + 2, causal if told else everything, heads=4), told)
    if "window" in accepts:
        near = (rows - columns <= 6) & (columns - rows <= 2)
        yield Question("window", _problem(seed + 3, near), {"window": (6, 2)})
    if "scale" in accepts:
        yield Question("scale", _problem(seed + 4, everything, scale=0.9), {"scale": 0.9})
    if "softcap" in accepts:
        yield Question("softcap", _problem(seed + 5, everything, softcap=1.5), {"softcap": 1.5})
    if "mask" in accepts:
        yield Question("mask, and a query that sees nothing", _problem(seed + 6, hidden), {"mask": hidden})
    if "documents" in accepts:
        same = causal & (documents[:, None] == documents[None, :])
        yield Question("documents", _problem(seed + 7, same), {"documents": documents, "causal": True})
    if "sinks" in accepts:
        sinks = np.array([2.0, -1.0])
        yield Question("sinks", _problem(seed + 8, causal, sinks=sinks), {"sinks": sinks, "causal": True})
    yield Question("large scores", _problem(seed + 9, everything, times=8.0))


def _problem(
    seed: int, sees: Bools, heads: int = 2, scale: float = WIDTH**-0.5, times: float = 2.0, **further: Any
) -> Problem:
    rng = np.random.default_rng(seed)
    q, k, v, dout = (rng.standard_normal((1, h, sees.shape[0], WIDTH)) for h in (heads, 2, 2, heads))
    return Problem(times * q, k, v, dout, scale, sees[None, None], **further)


def check_attention(
    attention: Callable[..., Any], *, accepts: Collection[str] = ("causal", "grouped"),
    ring_sizes: Sequence[int] = (1, 2, 3, 4), library: str = "numpy", dtype: str = "float32",
    gradients: bool = True,
) -> Report:  # fmt: skip
    """Ask ``attention`` and compare with dense attention in float64; raises AssertionError with what is wrong.

    attention: called with whole arrays q, k, v [1, H, N, D] of ``library``, ``ring_size`` and keywords out of
        ``accepts``, as `ringcore.ring_attention` means them; gives out, or a tuple that begins with it.
    accepts: out of ACCEPTS; what is not among them is not asked. "grouped" is fewer heads of k and v than of q.
    library: "numpy", "torch" or "jax". gradients: whether gradients of q, k and v are asked for, by the library's own
        way; NumPy has none.

    Returns the report if all is right. Use `ask` for one that does not raise.
    """
    __tracebackhide__ = True
    report = ask(attention, accepts=accepts, ring_sizes=ring_sizes, library=library, dtype=dtype, gradients=gradients)
    if not report.right:
        raise AssertionError(str(report))
    return report


def ask(
    attention: Callable[..., Any], *, accepts: Collection[str] = ("causal", "grouped"),
    ring_sizes: Sequence[int] = (1, 2, 3, 4), library: str = "numpy", dtype: str = "float32",
    gradients: bool = True,
) -> Report:  # fmt: skip
    """As `check_attention`, without raising for what is wrong."""
    made, faults = library_of(library, dtype), list[Fault]()
    observations = [
        Observation(question.problem, Dealt.contiguous(LENGTH, LENGTH, size), given, question.name)
        for question, size in asked(accepts, ring_sizes, made)
        if (given := answer(attention, question, size, made, gradients, faults)) is not None
    ]
    return report_of(observations, faults, dtype)


def asked(
    accepts: Collection[str], ring_sizes: Sequence[int], library: Library, length: int = LENGTH
) -> list[tuple[Question, int]]:
    """All questions, each with each ring size, in numbers that the library's dtype has."""
    return [(question, size) for question in map(library.rounded, questions(accepts, length)) for size in ring_sizes]


def report_of(observations: Sequence[Observation], faults: Sequence[Fault], dtype: str) -> Report:
    """What the answers in this dtype say."""
    errors = {
        (each.name, each.dealt.size, result): error
        for each in observations
        for result, error in each.differences(right(each.problem)).items()
    }
    sums = {
        each.dealt.size: tuple(each.given["out"].mean(-1).ravel().tolist())
        for each in observations
        if each.name == SUMS and "out" in each.given
    }
    count = len(observations) + sum(fault.unanswered for fault in faults)
    return Report(count, errors, tuple(diagnose(observations, TOLERANCES[dtype])), tuple(faults), sums)


def answer(
    attention: Callable[..., Any], question: Question, size: int, library: Library, gradients: bool, faults: list[Fault]
) -> dict[str, Floats] | None:
    """What came, as float64; None if nothing did. What is wrong with it but its numbers goes to ``faults``."""

    def wrong(words: str, unanswered: bool = False) -> None:
        faults.append(Fault(question.name, size, words, unanswered))

    problem = question.problem
    arrays = [library.make(x) for x in (problem.q, problem.k, problem.v)]
    keywords = {
        name: library.make(x) if name == "sinks" else library.plain(x) if name == "mask" else x
        for name, x in question.keywords.items()
    }
    try:
        # Twice in the same way: a function that is differentiated may round otherwise than one that is not.
        given, again = (
            library.call(attention, arrays, problem.dout if gradients else None, ring_size=size, **keywords)
            for _ in range(2)
        )
    except Exception as error:  # theirs, whatever it is: the next question is asked all the same
        wrong(f"raised {type(error).__name__}: {error}", unanswered=True)
        return None
    found = {}
    for name, x in given.items():
        due = problem.dout if name == "out" else getattr(problem, name[1:])
        if tuple(x.shape) != due.shape:
            wrong(f"{name} has shape {tuple(x.shape)}, due is {due.shape}")
        elif library.dtype_of(x) != library.dtype:
            wrong(f"{name} is {library.dtype_of(x)}, the arrays given were {library.dtype}")
        else:
            found[name] = library.back(x)
    for name, x, before in zip("qkv", arrays, (problem.q, problem.k, problem.v), strict=True):
        if not np.array_equal(library.back(x), before):
            wrong(f"{name} was written to")
    if "out" in found and not np.array_equal(found["out"], library.back(again["out"]), equal_nan=True):
        wrong("the same call gave other numbers the second time")
    return found
