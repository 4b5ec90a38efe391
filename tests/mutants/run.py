"""Whether the suite kills every mutant: ``python tests/mutants/run.py [--only NAME ...] [--jobs N]``.

The tests named by the table must fail on a copy of the tree with the mutant planted in it, and those that failed must
pass on a copy without any.
A mutant is stale if its source text does not occur exactly once. The exit status is 0 only if all were killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))  # python -P leaves it out

from mutant import Mutant  # noqa: E402
from mutants import MUTANTS  # noqa: E402

TREE = ("ringcore", "adapters", "tests", "pyproject.toml")
DEADLINE = 60  # seconds for one run of pytest, which takes two or three of them
TOGETHER = 600  # the same, where the tests that killed many mutants run at once
PATIENCE = 5  # seconds that a rank of a mutant waits for its peers
SHARED_MEMORY = Path("/dev/shm")
WAITING = {"RingTimeout", "PeerError", "TimeoutExpired"}  # how tests fail whose ranks wait for ever


@dataclass(frozen=True)
class Ran:
    """One run of pytest: its exit status, None if it was stopped at the deadline, and what the witness wrote."""

    status: int | None
    failures: tuple[dict[str, Any], ...]
    strangers: frozenset[str]
    seconds: float
    output: str


@dataclass(frozen=True)
class Verdict:
    """How it ended for a mutant, in words, and the test that killed it: None if it hung before one could fail."""

    killed: bool
    words: str
    seconds: float = 0.0
    output: str = ""
    test: str | None = None


def copy_tree(to: Path) -> None:
    """Copy what the tests need, without any bytecode."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy(ROOT / name, to / name)


def plant(mutant: Mutant, tree: Path) -> str:
    """Put the mutant into the tree; what is wrong with the mutant, or "" if nothing is."""
    file = tree / mutant.file
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text.count(mutant.source) != 1:
        return f"stale: its source occurs {text.count(mutant.source)} times in {mutant.file}"
    changed = text.replace(mutant.source, mutant.replacement)
    try:
        compile(changed, mutant.file, "exec")
    except SyntaxError as error:
        return f"no Python: {error}"
    file.write_text(changed, encoding="utf-8")
    return ""


def started(ranks: int, launcher: str) -> list[str]:
    """How the Python of so many ranks is started."""
    if ranks and launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpiexec = [shutil.which("mpiexec", path=path) or "mpiexec", "-n", str(ranks)] if ranks else []
    return [*mpiexec, sys.executable]


def run(tree: Path, tests: Sequence[str], ranks: int, launcher: str, deadline: float = DEADLINE) -> Ran:
    """Run pytest on the tree's own code, until its first failure."""
    command = [*started(ranks, launcher), "-m", "pytest", "-q", "-x", "-p", "witness", *tests]
    written, start = tree / "witness.jsonl", time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tree, tree / "adapters", tree / "tests" / "mutants"))),
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant of the same size within the same second would not be seen
        "RINGCORE_TREE": str(tree),
        "RINGCORE_WITNESS": str(written),
        "RINGCORE_TIMEOUT": str(PATIENCE),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=deadline)
            status = process.returncode
        except subprocess.TimeoutExpired:
            output, status = stop(process), None
    lines = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
    written.unlink(missing_ok=True)
    failures = tuple(line for line in lines if "test" in line)
    strangers = frozenset(line["stranger"] for line in lines if "stranger" in line)
    return Ran(status, failures, strangers, time.monotonic() - start, output)


def stop(process: subprocess.Popen[str]) -> str:
    """End the process and all that it started; what it said."""
    os.killpg(process.pid, signal.SIGTERM)  # the launcher ends its ranks
    try:
        output, _ = process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return output


def sweep(before: set[Path]) -> None:
    """Take away the shared memory of ranks that were aborted before their ring was made, if no process maps it."""
    mapped = ""
    for file in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            mapped += file.read_text()
    for segment in set(SHARED_MEMORY.glob("mpich_shm_*")) - before:
        if str(segment) not in mapped:
            segment.unlink(missing_ok=True)


def judge(mutant: Mutant, ran: Ran) -> Verdict:
    """Killed only by a test that failed as the mutant says; errors of collection and of fixtures are no kill."""
    if ran.strangers:
        return Verdict(False, f"not tested: imported from elsewhere: {', '.join(sorted(ran.strangers))}", ran.seconds)
    due = {mutant.error, "Failed"} | (WAITING if mutant.hangs else set())  # Failed is pytest's own, as of `raises`
    for failure in ran.failures:
        named = [name for name in failure["errors"] if name in due]
        if named and ran.status != 0:
            return Verdict(True, f"{failure['test']}: {named[0]}", ran.seconds, test=failure["test"])
    if ran.status is None:
        return Verdict(mutant.hangs, f"hangs for {DEADLINE} s", ran.seconds, ran.output)
    if ran.status == 0:
        return Verdict(False, "SURVIVED", ran.seconds)
    if ran.failures:
        raised = "; ".join(f"{each['test']}: {each['errors'][0]}: {each['message']}" for each in ran.failures)
        return Verdict(False, f"no kill: not {mutant.error}: {raised}", ran.seconds)
    return Verdict(False, f"no kill: exit status {ran.status}, but no test failed", ran.seconds, ran.output)


def tests_of(mutant: Mutant) -> list[str]:
    """What pytest is given for it."""
    return [*shlex.split(mutant.tests), *(["-k", mutant.only] if mutant.only else [])]


def put_to_the_test(mutant: Mutant) -> Verdict:
    """Plant one mutant in a tree of its own and run its tests."""
    with tempfile.TemporaryDirectory(prefix="ringcore-mutant-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        wrong = plant(mutant, tree)
        if wrong:
            return Verdict(False, wrong)
        return judge(mutant, run(tree, tests_of(mutant), mutant.ranks, mutant.launcher))


def without_mutants(killed: Sequence[tuple[Mutant, Verdict]]) -> list[tuple[list[str], int, str]]:
    """The runs, each its tests, ranks and launcher, of what killed: those of like options at once."""
    together: dict[tuple[tuple[str, ...], int, str], dict[str, None]] = {}
    alone = []
    for mutant, verdict in killed:
        if verdict.test is None:
            alone.append((tests_of(mutant), mutant.ranks, mutant.launcher))
            continue
        words = shlex.split(mutant.tests)
        options = tuple(words[next((i for i, word in enumerate(words) if word.startswith("-")), len(words)) :])
        together.setdefault((options, mutant.ranks, mutant.launcher), {})[verdict.test] = None
    return [([*tests, *options], *how) for (options, *how), tests in together.items()] + alone


def sound(killed: Sequence[tuple[Mutant, Verdict]], workers: ThreadPoolExecutor) -> bool:
    """Whether all the tests that killed pass on the tree as it is; says which do not."""
    with tempfile.TemporaryDirectory(prefix="ringcore-mutant-", ignore_cleanup_errors=True) as folder:
        runs = []
        for place, (tests, ranks, launcher) in enumerate(without_mutants(killed)):
            tree = Path(folder).resolve() / str(place)
            tree.mkdir()
            copy_tree(tree)
            runs.append((tests, ranks, workers.submit(run, tree, tests, ranks, launcher, TOGETHER)))
        fine = True
        for tests, ranks, future in runs:
            ran = future.result()
            if ran.status != 0 or ran.failures or ran.strangers:
                fine = False
                words = f"{shlex.join(tests)} on {ranks} ranks (exit status {ran.status})"
                print(f"fails without any mutant: {words}\n{ran.output}")
    return fine


def main() -> int:
    """Run the session; 0 if every mutant was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose names hold one of these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at once")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.only or any(name in m.name for name in options.only)]
    if not chosen:
        parser.error("no mutant has such a name")
    start, width = time.monotonic(), max(len(mutant.name) for mutant in chosen)
    segments = set(SHARED_MEMORY.glob("mpich_shm_*"))
    with ThreadPoolExecutor(options.jobs) as workers:
        alive, killed = [], []
        for mutant, verdict in zip(chosen, workers.map(put_to_the_test, chosen), strict=True):
            print(f"{mutant.name:<{width}}  {verdict.seconds:5.1f} s  {verdict.words}", flush=True)
            if verdict.killed:
                killed.append((mutant, verdict))
            else:
                alive.append(mutant.name)
                print(verdict.output[-1500:], end="", flush=True)
        fine = sound(killed, workers)
    sweep(segments)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants killed in {time.monotonic() - start:.0f} s")
    for name in alive:
        print(f"not killed: {name}")
    return 0 if fine and not alive else 1


if __name__ == "__main__":
    sys.exit(main())
