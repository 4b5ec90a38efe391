"""Options of the conformance suite: which library, which ring, how many cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import recording
from backends import BACKENDS, RINGS
from cases import RING_SIZES, Case, every_case, few_cases, fused_cases, pairwise_cases
from launched import world


def pytest_addoption(parser):
    group = parser.getgroup("conformance")
    group.addoption("--backend", default="numpy", choices=sorted(BACKENDS), help="the array library to test")
    group.addoption("--ring", default="local", choices=sorted(RINGS), help="mpi, cupy-: mpiexec; gloo, nccl: torchrun")
    group.addoption("--cases", default="pairwise", choices=("few", "fused", "pairwise", "all"), help="how much of it")
    group.addoption("--part", default="1/1", help="K/N: of every N cases the Kth, for launches side by side")
    group.addoption("--alike", help="LAYOUT-SIZE-SHAPE-DTYPE-AXES of all cases, where each is compiled")
    group.addoption("--largest-ring", type=int, default=max(RING_SIZES), help="leave out larger rings")
    group.addoption("--record", type=Path, help="add counts, hardware, versions and command to this JSON file")


@pytest.fixture(scope="session")
def backend(request):
    return BACKENDS[request.config.getoption("--backend")]()


@pytest.fixture(scope="session")
def attend(request, backend):
    return RINGS[request.config.getoption("--ring")](backend)


def pytest_terminal_summary(terminalreporter, config):
    """Rank 0 records; where ranks were launched a failure ends them all before, and nothing is recorded."""
    path, (rank, ranks) = config.getoption("--record"), world()
    if path is None or rank > 0:
        return
    options = {name: config.getoption(f"--{name}") for name in ("backend", "ring", "cases", "part")}
    ran = "passed" in terminalreporter.stats  # else the library may not even be there
    gpus = BACKENDS[options["backend"]].gpus()[:ranks] if ran else []
    recording.add(path, recording.run(options, ranks, terminalreporter.stats, gpus))


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    largest = min(RINGS[metafunc.config.getoption("--ring")].largest(), metafunc.config.getoption("--largest-ring"))
    sizes = tuple(range(1, largest + 1))
    choose = {
        "all": lambda: [case for case in every_case() if case.size in sizes],
        "pairwise": lambda: pairwise_cases(sizes),
        "few": lambda: few_cases(tuple(size for size in sizes if size <= 3)),
        "fused": lambda: fused_cases(sizes),
    }
    chosen = metafunc.config.getoption("--cases")
    cases = choose[chosen]()
    if chosen != "fused":
        for further in BACKENDS[metafunc.config.getoption("--backend")].further_cases:
            cases += further(sizes)
    if alike := metafunc.config.getoption("--alike"):
        layout, size, *others = alike.split("-")
        cases = [Case(case.feature, layout, int(size), *others) for case in cases]
    place, parts = map(int, metafunc.config.getoption("--part").split("/"))
    metafunc.parametrize("case", list(dict.fromkeys(cases))[place - 1 :: parts], ids=str)
