"""Every rank runs the same tests in the same order: ``mpiexec -n 4 python -m pytest tests/mpi/world``."""

import faulthandler
import os

import pytest
from mpi4py import MPI

DEADLINE = 60  # seconds for one test; a rank that hangs longer ends the whole run
WORLD = MPI.COMM_WORLD

ERRORS = pytest.StashKey()


def pytest_configure(config):
    os.environ.setdefault("RINGCORE_TIMEOUT", "30")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[ERRORS] = os.fdopen(os.dup(2), "w")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if WORLD.rank > 0 and reporter is not None:
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115  # for the whole run; rank 0 speaks for all


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    faulthandler.dump_traceback_later(DEADLINE, exit=True, file=item.config.stash[ERRORS])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and WORLD.size > 1:
        # The others may be waiting for this rank: there is no going on.
        item.config.stash[ERRORS].write(f"\nrank {WORLD.rank} of {WORLD.size}: {item.nodeid}\n{report.longreprtext}\n")
        item.config.stash[ERRORS].flush()
        WORLD.Abort(1)
    return report


@pytest.fixture
def group():
    """A function that gives the communicator of so many ranks, or None on the others."""
    made = []

    def split(size, order=1):
        if size > WORLD.size:
            pytest.skip(f"needs {size} ranks")
        comm = WORLD.Split(0 if WORLD.rank < size else MPI.UNDEFINED, order * WORLD.rank)
        made.append(comm)
        return None if comm == MPI.COMM_NULL else comm

    yield split
    for comm in made:
        if comm != MPI.COMM_NULL:
            comm.Free()
