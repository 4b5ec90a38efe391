"""Launches and endings, each in processes of its own: wrong launchers, failures, deaths, Ctrl-C."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest

HERE = Path(__file__).parent
SHARED_MEMORY = Path("/dev/shm")
LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK")

pytestmark = [
    pytest.mark.skipif(
        any(name in os.environ for name in LAUNCHED), reason="itself under mpiexec: ranks start no ranks"
    ),
]


def launcher(ranks):
    """The mpiexec beside this Python, or the machine's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=path)
    assert found, "no mpiexec: pip install ringcore[mpich], or load the MPI module of the machine"
    return [found, "-n", str(ranks)]


def environment(**further):
    oversubscribed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    return launching.environment(**oversubscribed, **further)


def command(ranks, *words):
    return [*(launcher(ranks) if ranks else []), sys.executable, *words]


def launch(ranks, name, timeout=120, **further):
    """(exit status, {rank: its lines}, all that came out)."""
    return launching.run(command(ranks, str(HERE / "scenarios.py"), name), environment(**further), timeout)


@pytest.fixture
def nothing_left():
    """Checks that no process and no shared memory outlives the test."""

    def state():
        held = set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()
        return held, launching.processes("mpi/scenarios.py")

    before = state()
    yield
    until = time.monotonic() + 20
    while (left := [now - then for now, then in zip(state(), before, strict=True)]) != [set(), set()]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


@pytest.fixture
def own_segments_removed():
    """Clean up after a test that aborts MPI before a ring was made, as no ring can."""
    before = set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()
    yield
    for left in set(SHARED_MEMORY.glob("mpich_shm_*")) - before:
        left.unlink(missing_ok=True)


def test_a_call_that_ends_well(nothing_left):
    status, lines, output = launch(3, "fine")
    assert status == 0, output
    assert all("window" in lines[rank][0] for rank in range(3))


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"MV2_COMM_WORLD_SIZE": "4"},
        {"MPI_LOCALNRANKS": "4"},
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "1"},
    ],
)
def test_another_library_than_the_launchers_is_refused(variables):
    _, lines, output = launch(0, "alone", **variables)
    assert "TransportError" in lines[0][0], output
    assert f"{next(name for name in variables if variables[name] == '4')}=4" in lines[0][0]
    assert "MPI.COMM_WORLD has 1 process" in lines[0][0]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"PMI_SIZE": "1"},
        {"SLURM_NTASKS": "4"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_one_process_by_right_is_a_ring_of_one(variables):
    _, lines, output = launch(0, "alone", **variables)
    assert lines == {0: ["fine"]}, output


@pytest.mark.parametrize("way", ["kernel_fails", "kernel_fails_with_messages", "kernel_fails_with_large_messages"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_kernel_that_fails_on_one_rank_ends_the_call_on_all(ranks, way, nothing_left):
    status, lines, output = launch(ranks, way)
    assert status == 0, output
    for rank in range(ranks):
        # A rank that already had all it needed when its peer failed hears of it in its next call.
        while rank != 1 and way != "kernel_fails" and lines[rank][0] == "fine":
            lines[rank].pop(0)
        first, *later = lines[rank]
        own, heard = "ZeroDivisionError: a kernel failed", "PeerError: rank 1 failed"
        assert first.startswith(own if rank == 1 else heard), output
        assert "a kernel failed" in first
        assert all(line.startswith("TransportError: this ring ended") for line in later)


def test_a_failure_that_nobody_catches_ends_every_process(nothing_left):
    status, _, output = launch(4, "nobody_catches")
    assert status != 0
    assert "ZeroDivisionError: a kernel failed" in output


def test_a_new_ring_after_a_failure(nothing_left):
    status, lines, output = launch(4, "recovers")
    assert status == 0, output
    assert all(lines[rank][1] == "fine" for rank in range(4)), output


def test_a_rank_that_dies_ends_every_process(nothing_left):
    started = time.monotonic()
    status, _, output = launch(3, "dies")
    assert status != 0, output
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("way", ["leaves_early", "does_not_enter"])
def test_a_rank_that_is_not_there_is_a_timeout(way, own_segments_removed):
    status, lines, output = launch(2, way)
    assert status != 0
    assert "RingTimeout" in lines[0][0], output
    assert "all 2 ranks to enter the ring" in lines[0][0]


def test_a_rank_that_is_late_is_a_timeout_on_all(nothing_left):
    status, lines, output = launch(3, "times_out")
    assert status == 0, output
    assert all(re.match("(RingTimeout|PeerError)", lines[rank][0]) for rank in range(3)), output
    assert "waited 3 s for rank 1" in output


@pytest.mark.parametrize(("way", "name"), [("shapes_differ", "width of q and k"), ("keywords_differ", "causal")])
def test_ranks_that_disagree_all_hear_it_and_may_call_again(way, name, nothing_left):
    status, lines, output = launch(3, way)
    assert status == 0, output
    for rank in range(3):
        assert lines[rank][0].startswith(f"AgreementError: the ranks disagree on {name}"), output
        assert lines[rank][1] == "fine"


def test_without_threads_in_mpi_there_is_no_thread_and_all_is_well(nothing_left):
    status, lines, output = launch(2, "thread_funneled", MPI4PY_RC_THREAD_LEVEL="funneled")
    assert status == 0, output
    assert all(lines[rank][0].startswith("True") for rank in range(2)), output
    assert all("while this rank waits" in lines[rank][0] for rank in range(2))


def test_mpi_may_be_finalized_by_hand(nothing_left):
    status, lines, output = launch(2, "finalizes_itself")
    assert status == 0, output
    assert lines == {0: ["fine"], 1: ["fine"]}


@pytest.mark.parametrize("who", ["mpiexec", "rank 0", "rank 1"])
def test_interrupt_leaves_nothing_behind(who, nothing_left):
    due = command(3, str(HERE / "scenarios.py"), "rings_for_ever")
    running = subprocess.Popen(due, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        pids = {}
        while len(pids) < 3:
            line = running.stdout.readline()
            assert line, "it ended before it was interrupted"
            rank, pid = re.match(r"rank (\d+): pid (\d+)", line).groups()
            pids[f"rank {rank}"] = int(pid)
        time.sleep(0.5)
        os.kill(pids.get(who, running.pid), signal.SIGINT)
        output, _ = running.communicate(timeout=60)
    finally:
        running.kill()
        running.wait()
    assert running.returncode != 0, output
