"""Launches and endings, each in processes of its own: failures, deaths, ranks that differ or do not come, Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest

SCENARIOS = Path(__file__).parent / "gloo_scenarios.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
LIMIT = 200  # seconds; loading Torch in every rank takes most of them on a busy machine

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif("TORCHELASTIC_RUN_ID" in os.environ, reason="itself under torchrun: ranks start no ranks"),
]


def command(ranks, name):
    return [*TORCHRUN, str(ranks), str(SCENARIOS), name]


def launch(ranks, name):
    """(exit status, {rank: its lines}, all that came out) of ranks that torchrun starts."""
    return launching.run(command(ranks, name), launching.environment(), LIMIT)


def start_by_hand(ranks, name):
    """({rank: exit status}, {rank: its lines}, all that came out) of ranks that no launcher ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCENARIOS), name],
            env=launching.environment(**where, RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        output = "".join(one.communicate(timeout=LIMIT)[0] for one in running)
    finally:
        for one in running:
            one.kill()
            one.wait()
    return [one.returncode for one in running], launching.lines_of(output), output


@pytest.fixture(autouse=True)
def nothing_left():
    """Checks that no process outlives the test."""
    before = launching.processes(SCENARIOS.name)
    yield
    until = time.monotonic() + 30
    while left := launching.processes(SCENARIOS.name) - before:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_a_call_that_ends_well():
    status, lines, output = launch(3, "fine")
    assert status == 0, output
    assert all("gloo" in lines[rank][0] for rank in range(3))


def test_without_an_initialised_world_there_is_no_ring():
    status, lines, output = launch(1, "not_initialised")
    assert status == 0, output
    assert len(lines[0]) == 2
    assert all(line.startswith("TransportError: torch.distributed is not initialised") for line in lines[0])


def test_the_example_of_the_documentation_is_right():
    example = Path(__file__).parents[2] / "docs" / "examples" / "torchrun_ring.py"
    status, _, output = launching.run(
        [*TORCHRUN, "2", str(example), "--backend", "gloo"], launching.environment(), LIMIT
    )
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("2 ranks over gloo")]
    differences = [float(number) for number in re.findall(r" d?[a-z]+ (\d\.\de-\d\d)", line)]
    assert len(differences) == 4
    assert max(differences) < 1e-5, line


@pytest.mark.parametrize("way", ["kernel_fails", "kernel_fails_with_large_messages", "kernel_fails_in_backward"])
def test_a_kernel_that_fails_on_one_rank_ends_the_call_on_all(way):
    status, lines, output = launch(3, way)
    assert status == 0, output
    for rank in range(3):
        # A rank that already had all it needed when its peer failed hears of it in its next call.
        if rank != 1 and lines[rank][0] == "fine":
            lines[rank].pop(0)
        first, *later = lines[rank]
        assert first.startswith("ZeroDivisionError: a" if rank == 1 else "PeerError: rank 1 failed"), output
        assert "a kernel failed" in first
        assert all(line.startswith("TransportError: this ring ended") for line in later), output


@pytest.mark.parametrize(
    ("way", "words"),
    [("nobody_catches", "ZeroDivisionError: a kernel failed"), ("raises_alone", 'KeyError: "of the user\'s own"')],
)
def test_a_failure_that_nobody_catches_ends_every_process(way, words):
    status, _, output = launch(3, way)
    assert status != 0
    assert words in output


def test_a_new_group_after_a_failure():
    status, lines, output = launch(3, "recovers")
    assert status == 0, output
    assert all(lines[rank][-1] == "fine" for rank in range(3)), output


@pytest.mark.parametrize("who", ["first", "last"])
def test_a_rank_that_dies_is_an_error_on_the_others_at_once(who):
    """Rank 0 holds the store by which failures are told; its end must be heard too."""
    gone = 0 if who == "first" else 2
    statuses, lines, output = start_by_hand(3, f"{who}_dies")
    assert statuses[gone] == -signal.SIGKILL
    for rank in {0, 1, 2} - {gone}:
        assert statuses[rank] == 3, output
        assert lines[rank][0].startswith("PeerError: "), output
    assert "a rank is gone" in output


def test_a_rank_that_dies_ends_every_process():
    status, _, output = launch(3, "last_dies")
    assert status != 0, output


@pytest.mark.parametrize(("way", "name"), [("shapes_differ", "width of q and k"), ("keywords_differ", "causal")])
def test_ranks_that_disagree_all_hear_it_and_may_call_again(way, name):
    status, lines, output = launch(3, way)
    assert status == 0, output
    for rank in range(3):
        assert lines[rank][0].startswith(f"AgreementError: the ranks disagree on {name}"), output
        assert lines[rank][1] == "fine"


def test_a_rank_that_never_calls_is_a_timeout_on_all_others():
    status, lines, output = launch(3, "never_calls")
    assert status == 0, output
    assert all(re.match("(RingTimeout|PeerError)", lines[rank][0]) for rank in (0, 2)), output
    assert "waited 3 s for rank 1 to take part in the call" in output


def test_a_rank_that_is_late_hears_of_the_timeout():
    status, lines, output = launch(3, "is_late")
    assert status == 0, output
    assert re.match("PeerError: rank [02] failed, so rank 1 stopped too: RingTimeout", lines[1][0]), output


def test_a_rank_that_does_not_enter_the_ring_is_a_timeout():
    status, lines, output = launch(2, "does_not_enter")
    assert status == 0, output
    assert lines[0][0].startswith("RingTimeout: rank 0 waited 1 s for all 2 ranks to enter the ring"), output


def test_interrupt_leaves_nothing_behind():
    running = subprocess.Popen(
        command(3, "rings_for_ever"),
        env=launching.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        begun = 0
        while begun < 3:
            line = running.stdout.readline()
            assert line, "it ended before it was interrupted"
            begun += "pid" in line
        os.kill(running.pid, signal.SIGINT)
        running.communicate(timeout=120)
    finally:
        running.kill()
        running.wait()
    assert running.returncode != 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("assert RANK == 0, 'of rank 1 alone'; time.sleep(20)", "of rank 1 alone"),
        ("time.sleep(100 * RANK)", "Timeout (0:00:05)!"),
    ],
)
def test_a_test_that_fails_or_hangs_on_one_rank_ends_the_whole_run(tmp_path, body, words):
    top = "import os, time\nimport conftest\nRANK = int(os.environ['RANK'])\nconftest.DEADLINE = 5\n"
    (tmp_path / "test_one_rank.py").write_text(f"{top}\n\ndef test_it():\n    {body}\n")
    pytest_there = ["-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)]
    status, _, output = launching.run([*TORCHRUN, "2", *pytest_there], launching.environment(), LIMIT)
    assert status != 0
    assert words in output, output
