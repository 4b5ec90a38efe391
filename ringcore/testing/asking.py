"""Ask an implementation of attention what attention gives, on several rings, and say what is wrong with its answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ringcore.testing.diagnosis import Observation
from ringcore.testing.libraries import Library, NoArray, library_of
from ringcore.testing.meaning import problem_of
from ringcore.testing.problem import Dealt, Floats, Question
from ringcore.testing.report import (
    DTYPE,
    NO_ARRAY,
    OTHER_RANKS,
    RAISED,
    SHAPE,
    SUMS,
    UNSTEADY,
    WEIGHTS,
    WRITTEN,
    Fault,
    Report,
    report_of,
)
from ringcore.testing.table import Shape, draw

Attention = Callable[..., Any]
LENGTH, WIDTH = 22, 8  # a length that rings of 3 and 4 do not divide
ACCEPTS = (
    "causal", "grouped", "window", "scale", "softcap", "mask", "bias", "documents", "key_lengths", "sinks", "alibi",
    "prefix", "dilated",
)  # fmt: skip
ROWS = (
    "causal", "window", "scale", "softcap", "mask for all", "bias", "documents", "key lengths", "sinks", "ALiBi",
    "prefix, causal", "dilated, two branches",
)  # fmt: skip
_TIMES = 2.0  # q as large as makes the weights of a row unlike each other


def questions(
    accepts: Collection[str] = (), length: int = LENGTH, dtype: str = "float32", seed: int = 0
) -> Iterator[Question]:
    """What is asked of an implementation that takes these keywords beside q, k and v, about so many positions.

    Rows of the table that ringcore's own tests ask, and what reads off weights. Rows that are causal beside what they
    are of are asked without, where "causal" is not taken. Raises ValueError for a word that is not of ACCEPTS.
    """
    unknown = [name for name in accepts if name not in ACCEPTS]
    if unknown:
        raise ValueError(f"accepts holds {unknown[0]!r}; it must hold some of {', '.join(ACCEPTS)}.")
    narrow, wide = (Shape(1, heads, 2, length, length, WIDTH, WIDTH) for heads in (2, 4))
    masked = "causal" if "causal" in accepts else "plain"
    plain = _drawn("plain", narrow, dtype, seed)
    yield plain
    yield replace(plain, name=SUMS, problem=replace(plain.problem, v=np.ones_like(plain.problem.v)))
    for row in ROWS:
        asked = _drawn(row, narrow, dtype, seed, causal="causal" in accepts)
        if asked.keywords and needs(asked.keywords) <= set(accepts):
            yield asked
    if "dilated" in accepts:  # with heads enough to tell their offsets apart; few take grouped ones
        yield replace(_drawn("dilated, two branches", replace(wide, key_heads=4), dtype, seed), name="dilated, 4 heads")
    if "grouped" in accepts:
        yield replace(_drawn(masked, wide, dtype, seed + 1), name="grouped heads")
    for times in (8.0, 128.0):
        yield replace(_drawn("plain", narrow, dtype, seed + 2, times), name=f"scores {times:g} times as large")
    seen = _drawn(masked, narrow, dtype, seed)
    for first in range(0, length, WIDTH):
        one = np.eye(length, WIDTH, -first)
        v = np.broadcast_to(one, seen.problem.v.shape).copy()
        name = f"{WEIGHTS} of keys {first} to {min(first + WIDTH, length) - 1}"
        yield replace(seen, name=name, problem=replace(seen.problem, v=v))


def needs(keywords: Mapping[str, Any]) -> set[str]:
    """What an implementation must accept to be asked this, out of ACCEPTS."""
    return {"dilated" if name in ("segment_lengths", "dilation_rates") else name for name in keywords}


def _drawn(row: str, shape: Shape, dtype: str, seed: int, times: float = 1.0, causal: bool = True) -> Question:
    arrays, keywords = draw(row, np.random.default_rng([seed, *map(ord, row)]), shape, dtype)
    arrays["q"] = (arrays["q"] * (_TIMES * times)).astype(dtype)
    arrays["dlse"] = np.zeros_like(arrays["dlse"])  # nobody is asked for lse
    if not np.any(keywords.get("query_offset", 0)):
        keywords.pop("query_offset", None)
    if not causal:
        keywords.pop("causal", None)
    return Question(row if causal else row.removesuffix(", causal"), problem_of(arrays, keywords), keywords)


@dataclass(frozen=True)
class Case:
    """One question on one ring, for tests of one's own: ``pytest.mark.parametrize("case", cases(...), ids=str)``."""

    question: Question
    size: int
    library: Library

    def __str__(self) -> str:
        return f"{self.question.name}-{self.size}".replace(" ", "_")

    def check(self, attention: Attention, gradients: bool = True) -> None:
        """Ask ``attention``, as `check_attention` does; raises AssertionError with what is wrong."""
        __tracebackhide__ = True
        faults = list[Fault]()
        observed = self.observe(attention, gradients, faults)
        report = report_of([] if observed is None else [observed], faults, self.library.dtype)
        if not report.right:
            raise AssertionError(str(report))

    def observe(self, attention: Attention, gradients: bool, faults: list[Fault]) -> Observation | None:
        """What ``attention`` answers, if it does; what is wrong beside its numbers goes to ``faults``."""
        given = answer(attention, self.question, self.size, self.library, gradients, faults)
        positions = self.question.problem.positions
        dealt = Dealt.contiguous(positions, positions, self.size)
        return None if given is None else Observation(self.question.problem, dealt, given, self.question.name)


def cases(
    accepts: Collection[str] = ("causal", "grouped"), ring_sizes: Sequence[int] = (1, 2, 3, 4),
    library: str = "numpy", dtype: str = "float32", device: str | None = None, length: int = LENGTH,
) -> list[Case]:  # fmt: skip
    """All that `check_attention` asks, one by one; length: how many positions there are."""
    made = library_of(library, dtype, device)
    return [Case(question, size, made) for question, size in asked(accepts, ring_sizes, made, length)]


def check_attention(
    attention: Attention, *, accepts: Collection[str] = ("causal", "grouped"),
    ring_sizes: Sequence[int] = (1, 2, 3, 4), library: str = "numpy", dtype: str = "float32",
    device: str | None = None, length: int = LENGTH, gradients: bool = True,
) -> Report:  # fmt: skip
    """Ask ``attention`` and compare with dense attention in float64; raises AssertionError with what is wrong.

    attention: called with whole arrays q, k, v [1, H, N, D] of ``library``, ``ring_size`` and keywords out of
        ``accepts``, as `ringcore.ring_attention` means them; gives out, or a tuple that begins with it.
    accepts: out of ACCEPTS; what is not among them is not asked. "grouped" is fewer heads of k and v than of q,
        "dilated" are ``segment_lengths`` and ``dilation_rates`` as `ringcore.dilated_attention` means them.
    library: "numpy", "torch", "jax" or "cupy". device: "cpu" or "cuda", the library's own if not given. length: how
        many positions. gradients: whether those of q, k and v are asked for, by the library's own way; NumPy and CuPy
        have none.

    Returns the report if all is right. Use `ask` for one that does not raise.
    """
    __tracebackhide__ = True
    report = ask(
        attention, accepts=accepts, ring_sizes=ring_sizes, library=library, dtype=dtype, device=device, length=length,
        gradients=gradients,
    )  # fmt: skip
    if not report.right:
        raise AssertionError(str(report))
    return report


def ask(
    attention: Attention, *, accepts: Collection[str] = ("causal", "grouped"),
    ring_sizes: Sequence[int] = (1, 2, 3, 4), library: str = "numpy", dtype: str = "float32",
    device: str | None = None, length: int = LENGTH, gradients: bool = True,
) -> Report:  # fmt: skip
    """As `check_attention`, without raising for what is wrong."""
    faults = list[Fault]()
    observed = [
        case.observe(attention, gradients, faults)
        for case in cases(accepts, ring_sizes, library, dtype, device, length)
    ]
    return report_of([each for each in observed if each is not None], faults, dtype)


def asked(
    accepts: Collection[str],
    ring_sizes: Sequence[int],
    library: Library,
    length: int = LENGTH,
    other_ranks: bool = False,
) -> list[tuple[Question, int]]:
    """All questions, each with each ring size; to a group of ``other_ranks`` the one that is causal, or the first."""
    whole = list(questions(accepts, length, library.dtype))
    if other_ranks:
        one = next((question for question in whole if question.name == "causal"), whole[0])
        whole = [replace(one, name=one.name + OTHER_RANKS)]
    return [(question, size) for question in whole for size in ring_sizes]


def answer(
    attention: Attention, question: Question, size: int, library: Library, gradients: bool, faults: list[Fault]
) -> dict[str, Floats] | None:
    """What came, as float64; None if nothing did. What is wrong with it but its numbers goes to ``faults``."""

    def wrong(kind: str, words: str, unanswered: bool = False) -> None:
        faults.append(Fault(question.name, size, words, kind, unanswered))

    problem = question.problem
    before = problem.q, *(x[:, :, problem.before :] for x in (problem.k, problem.v))  # a prefix is a keyword
    arrays = [library.make(x) for x in before]
    keywords = {name: _made(name, x, library) for name, x in question.keywords.items()}
    try:
        # Twice in the same way: a function that is differentiated may round otherwise than one that is not.
        given, again = (
            library.call(attention, arrays, problem.dout if gradients else None, ring_size=size, **keywords)
            for _ in range(2)
        )
    except NoArray as error:
        wrong(NO_ARRAY, str(error), unanswered=True)
        return None
    except Exception as error:  # theirs, whatever it is: the next question is asked all the same
        wrong(RAISED, f"raised {type(error).__name__}: {error}", unanswered=True)
        return None
    found = {}
    for name, x in given.items():
        due = problem.dout.shape if name == "out" else before["qkv".index(name[1:])].shape
        if tuple(x.shape) != due:
            wrong(SHAPE, f"{name} has shape {tuple(x.shape)}, due is {due}")
        elif library.dtype_of(x) != library.dtype:
            wrong(DTYPE, f"{name} is {library.dtype_of(x)}, the arrays given were {library.dtype}")
        else:
            found[name] = library.back(x)
    for name, x, due in zip("qkv", arrays, before, strict=True):
        if not np.array_equal(library.back(x), due):
            wrong(WRITTEN, f"{name} was written to")
    if "out" in found and not np.array_equal(found["out"], library.back(again["out"]), equal_nan=True):
        wrong(UNSTEADY, "the same call gave other numbers the second time")
    return found


def _made(name: str, x: Any, library: Library) -> Any:
    """A keyword's value as the library has it."""
    if name == "prefix":
        return tuple(library.make(each.astype(np.float64)) for each in x)
    if name in ("sinks", "bias", "alibi"):
        return library.make(x.astype(np.float64))
    return library.plain(x) if name == "mask" else x
