"""Audits: an implementation that is asked in a process of its own, which it may end, hang or fill with words."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ringcore.errors import MissingDependency
from ringcore.layout import resolve_layout
from ringcore.testing.asking import LENGTH, Fault, Report, asked, report_of
from ringcore.testing.diagnosis import NAMES, Observation
from ringcore.testing.libraries import library_of
from ringcore.testing.problem import Dealt, Floats

LAUNCHERS = ("local", "mpiexec", "torchrun")
_ERROR = re.compile(r"(\[rank\d+\]: ?)?[A-Za-z_][\w.]*(Error|Exception|Exit|Dependency)\b")


@dataclass(frozen=True)
class Spec:
    """What is audited.

    target: package.module:function. signature: see `ringcore.testing.signatures.attention_of`. library, accepts: in
    place of the signature's. deadline: seconds for each answer, and for the import. launcher: one of LAUNCHERS; under
    "mpiexec" and "torchrun" each rank is given its shards by ``layout`` of sequences of ``length`` positions.
    """

    target: str
    signature: str = "ringcore"
    ring_sizes: tuple[int, ...] = (1, 2, 3, 4)
    library: str | None = None
    dtype: str = "float32"
    accepts: tuple[str, ...] = ()
    gradients: bool = True
    deadline: float = 60.0
    launcher: str = "local"
    length: int = LENGTH
    layout: str = "contiguous"


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
            "launcher": self.spec.launcher, "layout": self.spec.layout, "length": self.spec.length,
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
            "sums_of_weights": [
                {"ring_size": size, "least": min(rows), "largest": max(rows), "rows": list(rows)}
                for size, rows in report.sums.items()
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
        with tempfile.TemporaryDirectory() as name:
            found = _asked(replace(spec, ring_sizes=sizes), Path(name))
        if isinstance(found, str):
            faults.append(Fault("to be imported", sizes[0], found, unanswered=True))
            break
        observations += found[0]
        faults += found[1]
        known = found[2]
    report = report_of(observations, faults, spec.dtype)
    return Audit(spec, report, tuple(known.get("accepts", ())), known.get("library", ""))


def _asked(spec: Spec, folder: Path) -> tuple[list[Observation], list[Fault], dict[str, Any]] | str:
    """The answers, what is wrong beside them, and what was asked with; or why there was nothing to ask."""
    ended, first = dict[int, str](), 0
    while True:
        why = _run(spec, first, folder)
        known, begun = _read(folder / "asked.json"), _read(folder / "begun.json")
        if known is None:
            return why or "it said nothing"
        if why is None:
            return *_collected(spec, folder, known, ended), known
        if begun is None:
            return why
        number = max(first, begun["number"])
        ended[number] = why
        first = number + 1


def _run(spec: Spec, first: int, folder: Path) -> str | None:
    """Run a worker to its end; what ended it before it had asked all, or None."""
    path, said = folder / "spec.json", folder / "said.txt"
    path.write_text(json.dumps({**asdict(spec), "first": first}))
    with said.open("wb") as output:
        process = subprocess.Popen(
            [*_launch(spec), "-m", "ringcore.testing.worker", str(path), str(folder)], stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        seen, since = _progress(folder), time.monotonic()
        while process.poll() is None:
            time.sleep(0.02)
            now = _progress(folder)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > spec.deadline:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"no answer within {spec.deadline:g} s"
    ranks = 1 if spec.launcher == "local" else spec.ring_sizes[0]
    if process.returncode == 0 and len(list(folder.glob("done.*.json"))) == ranks:
        return None
    lines = said.read_text(errors="replace").strip().splitlines()
    # The first error of those of all ranks and of the launcher, which only says that some failed.
    telling = next((line for line in lines if _ERROR.match(line)), lines[-1] if lines else "")
    words = f"; it said: {telling}" if telling else ""
    return f"the process ended with status {process.returncode}{words}"


def _launch(spec: Spec) -> list[str]:
    """The start of a command that runs a module in as many processes as are asked."""
    count = str(spec.ring_sizes[0])
    if spec.launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    if spec.launcher == "local":
        return [sys.executable]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=path)
    if found is None:
        raise MissingDependency('there is no mpiexec: pip install "ringcore[mpich]", or load the MPI of this machine.')
    return [found, "-n", count, sys.executable]


def _progress(folder: Path) -> tuple[int, float]:
    begun = folder / "begun.json"
    return len(list(folder.iterdir())), begun.stat().st_mtime if begun.exists() else 0.0


def _collected(
    spec: Spec, folder: Path, known: dict[str, Any], ended: dict[int, str]
) -> tuple[list[Observation], list[Fault]]:
    made, launched = library_of(known["library"], spec.dtype), spec.launcher != "local"
    observations, faults = list[Observation](), list[Fault]()
    for number, (question, size) in enumerate(asked(known["accepts"], spec.ring_sizes, made, spec.length)):
        if number in ended:
            faults.append(Fault(question.name, size, ended[number], unanswered=True))
            continue
        dealt = Dealt.contiguous(spec.length, spec.length, size)
        if launched:
            dealt = Dealt.by(resolve_layout(spec.layout, spec.length, size))
        parts = []
        for rank in range(size if launched else 1):
            where = f"rank {rank}: " if launched else ""
            for words, unanswered in _read(folder / f"{number}.{rank}.json") or []:
                faults.append(Fault(question.name, size, where + words, unanswered and not rank))
            path = folder / f"{number}.{rank}.npz"
            if path.exists():
                with np.load(path) as given:
                    parts.append({name: given[name] for name in given.files})
        found = _joined(parts, dealt) if launched else parts[0] if parts else {}
        if found:
            observations.append(Observation(question.problem, dealt, found, question.name))
    return observations, faults


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


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None
