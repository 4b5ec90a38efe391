"""Tests under mpiexec or torchrun: every rank runs the same tests in the same order, and none of them may hang."""

import faulthandler
import os

import pytest
from launched import LAUNCHED, UNDER_TORCHRUN, world

DEADLINE = 180  # seconds for one test of several ranks; a rank that hangs longer ends the whole run
ERRORS = pytest.StashKey()


def end_every_rank():
    """The others may be waiting for this rank: there is no going on."""
    if UNDER_TORCHRUN:
        os._exit(1)  # torchrun ends the others
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if not LAUNCHED:
        return
    os.environ.setdefault("RINGCORE_TIMEOUT", "30")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[ERRORS] = os.fdopen(os.dup(2), "w")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if world()[0] > 0 and reporter is not None:
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
        rank, size = world()
        item.config.stash[ERRORS].write(f"\nrank {rank} of {size}: {item.nodeid}\n{report.longreprtext}\n")
        item.config.stash[ERRORS].flush()
        end_every_rank()
    return report
