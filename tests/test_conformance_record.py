"""The conformance suite keeps what a run found."""

import importlib
import json
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "conformance"

pytestmark = pytest.mark.timeout(120)


def record(path, *options, **variables):
    """(what the file holds, what the run printed) after a run of a few cases."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", str(SUITE), "--cases", "few", "--record", str(path)]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, env={**os.environ, **variables}
    )
    return json.loads(path.read_text()) if path.exists() else None, done.stdout


@pytest.fixture
def path(tmp_path):
    return tmp_path / "found.json"


def test_counts_are_those_that_pytest_prints_beside_hardware_versions_and_command(path):
    (found,), printed = record(path, "-k", "out_and_lse and window")
    (passed,) = re.findall(r"^(\d+) passed", printed, re.MULTILINE)
    assert found["passed"] == int(passed) > 0
    assert (found["failed"], found["error"], found["skipped"]) == (0, 0, 0)
    assert (found["backend"], found["ring"], found["cases"], found["ranks"]) == ("numpy", "local", "few", 1)
    assert found["versions"]["numpy"]
    assert found["cpu"]
    assert found["command"] == "pytest -q conformance --cases few --record found.json -k 'out_and_lse and window'"


def test_a_run_replaces_its_like_and_stands_beside_others(path):
    record(path, "-k", "out_and_lse and window")
    record(path, "-k", "out_and_lse and window", "--backend", "numpy-reference")
    found, _ = record(path, "-k", "no case has this name")
    assert [(run["backend"], run["passed"] > 0) for run in found] == [("numpy-reference", True), ("numpy", False)]


def test_failures_are_counted(path):
    (found,), printed = record(path, "-k", "out_and_lse and window", "--backend", "cupy")
    assert "passed" not in printed
    assert found["passed"] == 0
    assert found["error"] + found["failed"] > 0


def test_only_rank_0_records(path):
    found, _ = record(
        path, "-k", "no case has this name", TORCHELASTIC_RUN_ID="1", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2"
    )
    assert found is None


def test_the_fifth_of_all_cases_that_is_run_has_every_pair_of_choices(monkeypatch):
    monkeypatch.syspath_prepend(SUITE)
    every = list(dict.fromkeys(importlib.import_module("cases").every_case()))

    def pairs(cases):
        rows = ((case.feature, case.layout, case.size, case.shape, case.dtype) for case in cases)
        return {pair for row in rows for pair in combinations(enumerate(row), 2)}

    assert pairs(every[::5]) == pairs(every)
