"""Tests under mpiexec: every rank runs the same tests in the same order, and none of them may hang."""

import faulthandler
import os

import pytest

DEADLINE = 60  # seconds for one test under mpiexec; a rank that hangs longer ends the whole run
LAUNCHED = any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"))
ERRORS = pytest.StashKey()


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if not LAUNCHED:
        return
    from mpi4py import MPI

    os.environ.setdefault("RINGCORE_TIMEOUT", "30")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[ERRORS] = os.fdopen(os.dup(2), "w")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if MPI.COMM_WORLD.rank > 0 and reporter is not None:
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115  # for the whole run; rank 0 speaks for all


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not LAUNCHED:
        return (yield)
    faulthandler.dump_traceback_later(DEADLINE, exit=True, file=item.config.stash[ERRORS])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if LAUNCHED and report.failed:
        from mpi4py import MPI

        # The others may be waiting for this rank: there is no going on.
        world = MPI.COMM_WORLD
        item.config.stash[ERRORS].write(f"\nrank {world.rank} of {world.size}: {item.nodeid}\n{report.longreprtext}\n")
        item.config.stash[ERRORS].flush()
        world.Abort(1)
    return report
