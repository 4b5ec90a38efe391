"""Audits: an implementation that is asked in a process of its own, which it may end, hang or fill with words."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ringcore.layout import resolve_layout
from ringcore.testing.asking import asked
from ringcore.testing.diagnosis import NAMES, Observation
from ringcore.testing.libraries import library_of
from ringcore.testing.problem import Dealt, Floats, Question
from ringcore.testing.report import ENDED, HANG, OTHER_RANKS, Fault, Report, report_of
from ringcore.testing.running import Spec, read, run_worker


@dataclass(frozen=True)
class Audit:
    """What came of it.

    accepts, library: what was asked with; none if the function was never there to be asked. versions: of what it came
    from, and of the libraries beneath.
    """

    spec: Spec
    report: Report
    accepts: tuple[str, ...] = ()
    library: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All that it says, for machines."""
        report = self.report
        return {
            "target": self.spec.target, "signature": self.spec.signature, "library": self.library,
            "launcher": self.spec.launcher, "layout": self.spec.layout, "length": self.spec.length,
            "dtype": self.spec.dtype, "device": self.spec.device, "accepts": list(self.accepts),
            "ring_sizes": list(self.spec.ring_sizes), "versions": self.versions, "right": report.right,
            "asked": report.asked,
            "diagnoses": [
                {
                    "name": each.disease.name, "evidence": each.disease.evidence, "results": list(each.results),
                    "ring_sizes": list(each.sizes), "error": each.error, "fit": each.fit,
                    "questions": list(each.questions),
                }
                for each in report.diagnoses
            ],
            "faults": [
                {"question": each.question, "ring_size": each.size, "kind": each.kind, "what": each.words}
                for each in report.faults
            ],
            "sums_of_weights": [
                {"ring_size": size, "least": min(rows), "largest": max(rows), "rows": list(rows)}
                for size, rows in report.sums.items()
            ],
            "weights": [
                {"ring_size": size, "heads": np.round(each, 6).tolist()} for size, each in report.weights.items()
            ],
            "errors": [
                {"question": question, "ring_size": size, "result": result, "error": error}
                for (question, size, result), error in report.errors.items()
            ],
        }  # fmt: skip


def audit(spec: Spec) -> Audit:
    """Ask all questions, each worker going on behind the question that ended the one before."""
    rings = [spec.ring_sizes] if spec.launcher == "local" else [(size,) for size in spec.ring_sizes]
    observations, faults, known = list[Observation](), list[Fault](), dict[str, Any]()
    for sizes in rings:
        found = _found(replace(spec, ring_sizes=sizes))
        if isinstance(found, str):
            faults.append(Fault("to be imported", sizes[0], found, ENDED, unanswered=True))
            break
        observations += found[0]
        faults += found[1]
        known = found[2]
    if spec.launcher != "local" and known.get("joins") and not faults:
        # In a group whose ranks are not those of all processes, which some forget to tell apart.
        found = _found(replace(spec, ring_sizes=(max(spec.ring_sizes),), strangers=1))
        if isinstance(found, str):
            faults.append(Fault(f"to be imported{OTHER_RANKS}", max(spec.ring_sizes), found, ENDED, unanswered=True))
        else:
            observations += found[0]
            faults += found[1]
    report = report_of(observations, faults, spec.dtype)
    return Audit(spec, report, tuple(known.get("accepts", ())), known.get("library", ""), known.get("versions", {}))


def _found(spec: Spec) -> tuple[list[Observation], list[Fault], dict[str, Any]] | str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # one that was ended may still write
        return _asked(spec, Path(name))


def _asked(spec: Spec, folder: Path) -> tuple[list[Observation], list[Fault], dict[str, Any]] | str:
    """The answers, what is wrong beside them, and what was asked with; or why there was nothing to ask.

    A ring that hangs on two questions in turn is asked no more.
    """
    ended, first, hung, given_up = dict[int, tuple[str, str]](), 0, Counter[int](), list[int]()
    while True:
        why = run_worker(spec, first, given_up, folder)
        known, begun = read(folder / "asked.json"), read(folder / "begun.json")
        if known is None or (why is not None and begun is None):
            return why[0] if why else "it said nothing"
        made = library_of(known["library"], spec.dtype, spec.device)
        everything = asked(known["accepts"], spec.ring_sizes, made, spec.length, bool(spec.strangers))
        if why is not None:
            number = max(first, begun["number"])
            ended[number] = why
            hung[everything[number][1]] += why[1] == HANG
            given_up = [size for size, times in hung.items() if times > 1]
            left = (each for each in range(number + 1, len(everything)) if everything[each][1] not in given_up)
            first = next(left, len(everything))
        if why is None or first == len(everything):
            return *_collected(spec, folder, everything, ended, given_up), known


def _collected(
    spec: Spec, folder: Path, everything: list[tuple[Question, int]], ended: dict[int, tuple[str, str]],
    given_up: list[int],
) -> tuple[list[Observation], list[Fault]]:  # fmt: skip
    launched = spec.launcher != "local"
    observations, faults = list[Observation](), list[Fault]()
    for number, (question, size) in enumerate(everything):
        told = _told(folder, number, question.name, size, launched)
        if number in ended:
            faults.append(Fault(question.name, size, *ended[number], True))
            faults += [replace(each, unanswered=False) for each in told]
            continue
        if size in given_up and not (folder / f"{number}.0.json").exists():
            faults.append(Fault(question.name, size, "not asked, after two questions without an answer", HANG))
            continue
        faults += told
        dealt = Dealt.contiguous(spec.length, spec.length, size)
        if launched:
            dealt = Dealt.by(resolve_layout(spec.layout, spec.length, size))
        parts, missing = [], []
        for rank in range(size if launched else 1):
            path = folder / f"{number}.{rank}.npz"
            if path.exists():
                with np.load(path) as given:
                    parts.append({name: given[name] for name in given.files})
            else:
                missing.append(str(rank))
        found = _joined(parts, dealt) if launched else parts[0] if parts else {}
        if found:
            observations.append(Observation(question.problem, dealt, found, question.name))
        elif not told:
            faults.append(Fault(question.name, size, f"no answer of rank {', '.join(missing)}", ENDED, True))
    return observations, faults


def _told(folder: Path, number: int, question: str, size: int, launched: bool) -> list[Fault]:
    """What the ranks that answered or raised said is wrong beside numbers; one unanswered question is counted once."""
    found = list[Fault]()
    for rank in range(size if launched else 1):
        where = f"rank {rank}: " if launched else ""
        for words, kind, unanswered in read(folder / f"{number}.{rank}.json") or []:
            counted = any(each.unanswered for each in found)
            found.append(Fault(question, size, where + words, kind, unanswered and not counted))
    return found


def _joined(parts: list[dict[str, Floats]], dealt: Dealt) -> dict[str, Floats]:
    """Whole results, of those that every rank gave."""
    if len(parts) < dealt.size:
        return {}
    found = {}
    for name in (name for name in NAMES if all(name in part for part in parts)):
        positions = dealt.columns if name in ("dk", "dv") else dealt.rows
        order = np.argsort([position for rank in positions for position in rank])
        found[name] = np.concatenate([part[name] for part in parts], axis=2)[:, :, order]
    return found
