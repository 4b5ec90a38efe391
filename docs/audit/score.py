"""The scorecard: runs the audits of cards.toml, each in its environment, and makes the table of README.md.

python docs/audit/score.py run [NAME ...]   # all cards, or some; environments are made beside --environments
python docs/audit/score.py table            # puts what came out into README.md
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
HEAD = "| project | what | rings | dtype | what came out | largest error |"
CARDS = tomllib.loads((HERE / "cards.toml").read_text())


def environment(name: str, folder: Path) -> Path:
    """The folder of an environment's programs; made and filled if it is not there."""
    programs = folder / name / "bin"
    if not programs.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        for line in CARDS["environment"][name]["install"]:
            subprocess.run([str(programs / "pip"), "install", "-q", *shlex.split(line)], check=True, cwd=HERE)
    return programs


def run(card: dict, folder: Path) -> None:
    """Audit one, and write its report."""
    programs = environment(card["environment"], folder)
    path = f"{programs.resolve()}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **card.get("variables", {})}
    report = report_path(card)
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    command = [*shlex.split(card["command"]), "--json", str(report)]
    done = subprocess.run(command, cwd=HERE, env=variables, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"{card['name']} left no report:\n{done.stdout}\n{done.stderr}")
    print(f"{card['name']}: status {done.returncode}", flush=True)


def gpus() -> int:
    """How many this machine has of those that CUDA drives."""
    lists = shutil.which("nvidia-smi")
    shown = subprocess.run([lists, "-L"], capture_output=True, text=True).stdout if lists else ""
    return sum(line.startswith("GPU ") for line in shown.splitlines())


def table() -> str:
    """One line for each card that has a report."""
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for card in CARDS["card"]:
        if report_path(card).exists():
            lines.append(line(card, report_of(card)))
    return "\n".join(lines)


def report_path(card: dict) -> Path:
    """Where a card's report is."""
    return HERE / "reports" / f"{card['name']}.json"


def report_of(card: dict) -> dict:
    """What an audit found."""
    return json.loads(report_path(card).read_text())


def line(card: dict, report: dict) -> str:
    """The project with its version, what was asked, and what came of it."""
    versions = report["versions"]
    version = versions.get(card["project"], "")
    rings = ", ".join(map(str, report["ring_sizes"]))
    # Where scores are large their own rounding is most of the error, in any implementation.
    errors = [each["error"] for each in report["errors"] if "times as large" not in each["question"]]
    largest = "none" if not errors else "not finite" if None in errors else f"{max(errors):.1e}"
    cells = f"{card['project']} {version}", card["title"], rings, report["dtype"], outcome(report), largest
    return f"| {' | '.join(cells)} |"


def outcome(report: dict) -> str:
    """What is wrong, or that nothing is."""
    if report["right"]:
        return f"right in all {report['asked']} answers"
    said = []
    for each in report["diagnoses"]:
        rings = ", ".join(map(str, each["ring_sizes"]))
        said.append(f"**{each['name']}** ({', '.join(each['results']) or 'no answer'}; rings {rings})")
    # Of an answer once, whichever ranks say it.
    kinds = Counter(kind for kind, _, _ in {(x["kind"], x["question"], x["ring_size"]) for x in report["faults"]})
    said += [f"{kind}: {count} of {report['asked']}" for kind, count in sorted(kinds.items())]
    rest = [] if report["diagnoses"] or not report["errors"] else ["the others right"]
    return "; ".join(said + rest)


def main() -> None:
    """Run, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "ringcore-audits")
    asked = parser.parse_args()
    if asked.what == "table":
        page = HERE / "README.md"
        before, _, rest = page.read_text().partition(HEAD)
        page.write_text(before + table() + "\n\n" + rest.partition("\n\n")[2])
        return
    unknown = set(asked.names) - {card["name"] for card in CARDS["card"]}
    if unknown:
        parser.error(f"no cards {', '.join(sorted(unknown))}")
    there = gpus()
    for card in CARDS["card"]:
        if asked.names and card["name"] not in asked.names:
            continue
        if there < (due := card.get("gpus", 0)):
            print(f"{card['name']}: not run; it needs GPUs, {due} of them, and there are {there}", flush=True)
        else:
            run(card, asked.environments)


if __name__ == "__main__":
    main()
