"""Run a scenario of world.py on several processes, with a deadline, and collect what each rank found."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

PROGRAM = Path(__file__).with_name("world.py")


def on_ranks(scenario, folder, ranks=2, deadline=400):
    """What ``scenario`` returned on each rank. Every process is gone when this returns, or raises."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RINGCORE_TIMEOUT": "60", "WORLD_SIZE": str(ranks)}
    started = []
    try:
        for rank in range(ranks):
            with open(folder / f"{rank}.log", "w") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-P", str(PROGRAM), scenario, str(folder)],
                        env={**environment, "RANK": str(rank)}, stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        end = time.monotonic() + deadline
        codes = [process.wait(max(0.0, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = "\n".join((folder / f"{rank}.log").read_text() for rank in range(ranks))
    assert codes == [0] * ranks, f"{scenario} ended with {codes}:\n{said}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
