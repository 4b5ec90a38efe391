"""Audits: an implementation that is asked in a process of its own, which it may end, hang or fill with words."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ringcore.testing.asking import LENGTH, Fault, Report, asked, report_of
from ringcore.testing.diagnosis import Observation
from ringcore.testing.libraries import library_of
from ringcore.testing.problem import Dealt


@dataclass(frozen=True)
class Spec:
    """What is audited.

    target: package.module:function. signature: see `ringcore.testing.signatures.attention_of`. library, accepts: in
    place of the signature's. deadline: seconds for each answer, and for the import.
    """

    target: str
    signature: str = "ringcore"
    ring_sizes: tuple[int, ...] = (1, 2, 3, 4)
    library: str | None = None
    dtype: str = "float32"
    accepts: tuple[str, ...] = ()
    gradients: bool = True
    deadline: float = 60.0
    first: int = 0


@dataclass(frozen=True)
class Audit:
    """What came of it. accepts, library: what was asked with; none if the function was never there to be asked."""

    spec: Spec
    report: Report
    accepts: tuple[str, ...] = ()
    library: str = ""

    def as_json(self) -> dict[str, Any]:
        """All that it says, for machines."""
        report = self.report
        return {
            "target": self.spec.target, "signature": self.spec.signature, "library": self.library,
            "dtype": self.spec.dtype, "accepts": list(self.accepts), "ring_sizes": list(self.spec.ring_sizes),
            "right": report.right, "asked": report.asked,
            "diagnoses": [
                {
                    "name": each.disease.name, "evidence": each.disease.evidence, "results": list(each.results),
                    "ring_sizes": list(each.sizes), "error": each.error, "fit": each.fit,
                }
                for each in report.diagnoses
            ],
            "faults": [
                {"question": each.question, "ring_size": each.size, "what": each.words} for each in report.faults
            ],
            "errors": [
                {"question": question, "ring_size": size, "result": result, "error": error}
                for (question, size, result), error in report.errors.items()
            ],
        }  # fmt: skip


def audit(spec: Spec) -> Audit:
    """Ask all questions, each worker going on behind the question that ended the one before."""
    with tempfile.TemporaryDirectory() as name:
        folder, ended, first = Path(name), dict[int, str](), spec.first
        while True:
            why = _run(spec, first, folder)
            known = _read(folder / "asked.json")
            begun = _read(folder / "begun.json")
            if why is None or known is None:
                break
            number = first if begun is None else max(first, begun["number"])
            ended[number] = why
            first = number + 1
        if known is None:
            return Audit(spec, report_of([], [Fault("to be imported", 0, why or "it said nothing", True)], spec.dtype))
        return _collected(spec, folder, known, ended)


def _run(spec: Spec, first: int, folder: Path) -> str | None:
    """Run a worker to its end; what ended it before it had asked all, or None."""
    path, said = folder / "spec.json", folder / "said.txt"
    path.write_text(json.dumps({**asdict(spec), "first": first}))
    with said.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ringcore.testing.worker", str(path), str(folder)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        seen, since = _progress(folder), time.monotonic()
        while process.poll() is None:
            time.sleep(0.02)
            now = _progress(folder)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > spec.deadline:
                process.kill()
                process.wait()
                return f"no answer within {spec.deadline:g} s"
    if process.returncode == 0 and (folder / "done.json").exists():
        return None
    lines = said.read_text(errors="replace").strip().splitlines()
    last = f"; the last that it said: {lines[-1]}" if lines else ""
    return f"the process ended with status {process.returncode}{last}"


def _progress(folder: Path) -> tuple[int, float]:
    begun = folder / "begun.json"
    return len(list(folder.iterdir())), begun.stat().st_mtime if begun.exists() else 0.0


def _collected(spec: Spec, folder: Path, known: dict[str, Any], ended: dict[int, str]) -> Audit:
    made = library_of(known["library"], spec.dtype)
    observations, faults = list[Observation](), list[Fault]()
    for number, (question, size) in enumerate(asked(known["accepts"], spec.ring_sizes, made)):
        if number in ended:
            faults.append(Fault(question.name, size, ended[number], unanswered=True))
            continue
        faults += [Fault(question.name, size, words, no) for words, no in _read(folder / f"{number}.json") or []]
        path = folder / f"{number}.npz"
        if path.exists():
            with np.load(path) as given:
                found = {name: given[name] for name in given.files}
            observations.append(
                Observation(question.problem, Dealt.contiguous(LENGTH, LENGTH, size), found, question.name)
            )
    return Audit(spec, report_of(observations, faults, spec.dtype), tuple(known["accepts"]), known["library"])


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
