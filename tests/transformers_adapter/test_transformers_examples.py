"""The examples run, and find what they say they find."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(200)

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*command, deadline=400):
    done = subprocess.run([sys.executable, "-P", *command], capture_output=True, text=True, timeout=deadline)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("size", [1, 3])
def test_embeddings_of_minilm_are_those_of_stock_attention(size):
    said = run(EXAMPLES / "minilm_embeddings.py", "--ring-size", str(size), "--sentences", "24")
    assert said.startswith("24 sentences of ")
    difference = float(said.split("largest difference to sdpa: ")[1])
    print(f"\nring of {size}: {difference}", end="")
    assert difference < 1e-5


def test_training_on_two_ranks_gives_the_losses_of_one_process(tmp_path):
    options = [str(EXAMPLES / "train_llama.py"), "--steps", "4", "--length", "201"]
    said = run(*options, "--json", str(tmp_path / "one.json"))
    assert said.count("loss") == 4
    run(*LAUNCHER, *options, "--json", str(tmp_path / "two.json"))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["attention"], one["ranks"]) == ("sdpa", 1)
    assert (two["attention"], two["ranks"]) == ("ringcore", 2)
    assert one["losses"][3] < one["losses"][0] - 0.5
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)


def test_training_in_bfloat16_learns():
    said = run(
        EXAMPLES / "train_llama.py", "--steps", "4", "--length", "200", "--dtype", "bfloat16", "--attention", "ringcore"
    )
    losses = [float(line.split()[-1]) for line in said.splitlines()]
    assert losses[-1] < losses[0] - 0.5


def test_training_in_bfloat16_on_two_ranks_follows_the_losses_of_one_process(tmp_path):
    options = [str(BENCHMARKS / "training_gpu.py"), "--device", "cpu", "--steps", "8", "--length", "96"]
    said = run(*LAUNCHER, *options, "--json", str(tmp_path / "found.json"))
    assert "the ring follows" in said
    found = json.loads((tmp_path / "found.json").read_text())["results"]
    assert len(found["losses"]["ring"]) == 8
    assert found["losses"]["stock"][7] < found["losses"]["stock"][0] - 1.0
    assert 0.0 < found["relative_difference"]["ring"] < 1e-3


@pytest.mark.parametrize("options", [(), ("--sample", "--tokens", "23")], ids=["greedy", "sampled"])
def test_generating_on_two_ranks_gives_the_tokens_of_one_process(tmp_path, options):
    program = str(EXAMPLES / "generate_ring.py")
    run(program, *options, "--json", str(tmp_path / "one.json"))
    said = run(*LAUNCHER, program, *options, "--json", str(tmp_path / "two.json"))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    assert len(set(two["tokens"][-20:])) > 3, "it repeats itself"
    assert one["places"] / 2 <= two["places"] < 0.7 * one["places"]
    assert said.count("places for") == 2
