"""Workers: processes that ask one implementation, started, watched, and ended when they do not answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringcore.errors import MissingDependency
from ringcore.testing.asking import LENGTH
from ringcore.testing.report import ENDED, HANG, RAISED

LAUNCHERS = ("local", "mpiexec", "torchrun")
_START = 60.0
_LEAVE = 5.0  # seconds for processes to end by themselves, once all is answered
_FRAME = re.compile(r'File "(.*)", line (\d+) in (\S+)')
_ERROR = re.compile(r"(\[rank\d+\]: ?)?[A-Za-z_][\w.]*(Error|Exception|Exit|Dependency)\b")


@dataclass(frozen=True)
class Spec:
    """What is audited.

    target: package.module:function. signature: see `ringcore.testing.signatures.attention_of`. library, accepts: in
    place of the signature's. deadline: seconds for each answer. launcher: one of LAUNCHERS; under
    "mpiexec" and "torchrun" each rank is given its shards by ``layout`` of sequences of ``length`` positions. device:
    where arrays are, "cpu" or "cuda"; the library's own if not given. strangers: so many processes more, before those
    of the ring.
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
    device: str | None = None
    strangers: int = 0

    @property
    def start(self) -> float:
        """Seconds for processes to start and to import what they need, which a slow disk makes long."""
        return max(self.deadline, _START)


def run_worker(spec: Spec, first: int, given_up: list[int], folder: Path) -> tuple[str, str] | None:
    """Run a worker to its end; what ended it before it had asked all, in words and as a kind of fault, or None.

    It begins with question ``first``; rings of the sizes in ``given_up`` are not asked.
    """
    for old in (path for name in ("process.*", "ready", "done.*", "stuck.*") for path in folder.glob(name)):
        old.unlink()
    path, said = folder / "spec.json", folder / "said.txt"
    path.write_text(json.dumps({**asdict(spec), "first": first, "given_up": given_up, "start": spec.start}))
    with said.open("wb") as output:
        process = subprocess.Popen(
            [*_launch(spec), "-m", "ringcore.testing.worker", str(path), str(folder)], stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            why = _watched(process, spec, folder)
        finally:  # whatever ends the watch, Ctrl-C among it: they are in sessions of their own
            running = process.poll() is None
            if running:
                _end(process, folder)
    if running or why is not None or (process.returncode == 0 and _done(spec, folder)):
        return why
    lines = said.read_text(errors="replace").strip().splitlines()
    # The first error of those of all ranks and of the launcher, which only says that some failed.
    telling = next((line for line in lines if _ERROR.match(line)), lines[-1] if lines else "")
    words = f"; it said: {telling}" if telling else ""
    return f"the process ended with status {process.returncode}{words}", ENDED


def _watched(process: subprocess.Popen[bytes], spec: Spec, folder: Path) -> tuple[str, str] | None:
    """Until it ends, has answered all and does not end, or makes no progress, which is what it returns."""
    seen, since = _progress(folder), time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        now = _progress(folder)
        still = time.monotonic() - since
        if now != seen:
            seen, since = now, time.monotonic()
        elif _done(spec, folder):
            if still > _LEAVE:
                return None
        elif still > (limit := spec.deadline if (folder / "ready").exists() else spec.start):
            return f"no answer within {limit:g} s{_whereabouts(spec, folder)}", HANG
    return None


def _done(spec: Spec, folder: Path) -> bool:
    """Whether every rank has answered all that it was asked."""
    return len(list(folder.glob("done.*.json"))) == _ranks(spec)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """The launcher and all workers at once: torchrun's are in sessions of their own."""
    groups = [process.pid, *(int(path.suffix[1:]) for path in folder.glob("process.*"))]
    for each in groups:
        with suppress(ProcessLookupError):
            os.killpg(each, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()


def _ranks(spec: Spec) -> int:
    return 1 if spec.launcher == "local" else spec.ring_sizes[0]


def _whereabouts(spec: Spec, folder: Path) -> str:
    """Where each rank was when the deadline came near: its innermost line, or that it had answered or raised."""
    begun, found = read(folder / "begun.json"), []
    for rank in range(_ranks(spec)):
        stuck = folder / f"stuck.{rank}.txt"
        frames = _FRAME.findall(stuck.read_text().rpartition("Thread 0x")[2]) if stuck.exists() else []
        who = "it" if spec.launcher == "local" else f"rank {rank}"
        faults = read(folder / f"{begun['number']}.{rank}.json") if begun else None
        if faults is not None:
            found.append(f"{who} {'raised' if any(kind == RAISED for _, kind, _ in faults) else 'answered'}")
        elif frames:  # of its last thread, which is the main one, the innermost first
            file, line, name = frames[0]
            found.append(f"{who} was at {Path(file).name}:{line}, in {name}")
    return f": {'; '.join(found)}" if found else ""


def _launch(spec: Spec) -> list[str]:
    """The start of a command that runs a module in as many processes as are asked."""
    count = str(spec.strangers + spec.ring_sizes[0])
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


def read(path: Path) -> Any:
    """What a worker wrote, None if it did not."""
    return json.loads(path.read_text()) if path.exists() else None
