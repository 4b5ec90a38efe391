"""Failures on 2 GPUs, each in processes of its own: a rank whose stream waits for another one is freed."""

import re
import sys
from pathlib import Path

import launching
import pytest

SCENARIOS = Path(__file__).parent / "gpu_scenarios.py"
EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "torchrun_ring.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
LIMIT = 150

pytestmark = pytest.mark.timeout(200)


def launch(*arguments):
    """(exit status, {rank: its lines}, all that came out)."""
    return launching.run([*TORCHRUN, *map(str, arguments)], launching.environment(), LIMIT)


def test_a_rank_that_fails_frees_the_other_over_nccl():
    status, lines, output = launch(SCENARIOS, "fails", "nccl")
    assert status == 0, output
    assert lines[1][0] == "ZeroDivisionError: a kernel failed", output
    assert lines[0][:4] == ["fine", "soon", "fine", "soon"], output
    assert lines[0][4].startswith("PeerError: rank 1 failed, so rank 0 stopped too: ZeroDivisionError"), output
    assert lines[0][6].startswith("TransportError: this ring ended"), output
    assert "gradients that did not arrive are nan" in lines[0][8], output
    assert "long" not in lines[0] + lines[1], output


def test_a_rank_that_fails_frees_the_other_over_peer_memory():
    """By the deadline; a signal that did not come ends all work of that GPU's process, as Torch does it."""
    _, lines, output = launch(SCENARIOS, "fails", "peer_memory")
    assert lines[1][0] == "ZeroDivisionError: a kernel failed", output
    assert "long" not in lines[0] + lines[1], output
    assert "Error" in "".join(lines[0]), output


def test_a_rank_that_takes_too_long_is_a_timeout():
    status, lines, output = launch(SCENARIOS, "sleeps", "nccl")
    assert status == 0, output
    assert any(re.match("RingTimeout: rank 0 waited 4 s", line) for line in lines[0]), output
    assert any("RingTimeout" in line for line in lines[1]), output


def test_a_process_goes_on_over_another_group():
    status, lines, output = launch(SCENARIOS, "recovers", "nccl")
    assert status == 0, output
    for rank in range(2):
        assert lines[rank][-6:] == ["fine", "soon", "fine", "soon", "numbers", "ends"], output


def test_a_process_that_leaves_is_an_error_on_the_other():
    _, lines, output = launch(SCENARIOS, "leaves", "nccl")
    assert lines[0][0].startswith("PeerError: "), output
    assert lines[0][1] == "soon"


@pytest.mark.parametrize("arguments", [("--backend", "nccl"), ("--backend", "nccl", "--carrier", "nccl")])
def test_the_example_of_the_documentation_is_right(arguments):
    status, _, output = launch(EXAMPLE, *arguments)
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("2 ranks over nccl")]
    differences = [float(number) for number in re.findall(r" d?[a-z]+ (\d\.\de-\d\d)", line)]
    assert len(differences) == 4
    assert max(differences) < 1e-3, line  # float32 products on a GPU may be rounded to TF32
    assert ("messages: NCCL" in output) == ("--carrier" in arguments), output
