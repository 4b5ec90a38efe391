"""Peak memory of a process, against what it must hold."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import DTYPES, save_safetensors

pytestmark = pytest.mark.timeout(60)

BASE = 45 << 20  # the interpreter with NumPy and ringcore, and the command's own chunks of files
KERNELS = 8 << 20  # for each thread


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "target", "axes"),
    [
        ("float32", "float32", "bhsd"),
        ("float32", "float32", "bshd"),
        ("bfloat16", "bfloat16", "bhsd"),
        ("float32", "float16", "bshd"),
    ],
)
def test_peak_memory_is_the_tensors_and_little_more(tmp_path, dtype, target, axes):
    heads, rows, width = 4, 40000, 64
    shape = (1, heads, rows, width) if axes == "bhsd" else (1, rows, heads, width)
    x = np.random.default_rng(0).normal(size=shape).astype(DTYPES[dtype])
    save_safetensors(tmp_path / "x.safetensors", {"q": x, "k": x, "v": x})
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PMI")} | {"OMP_NUM_THREADS": "2"}
    call = ["x.safetensors", "--out", "o.safetensors", "--window", "64,0", "--axes", axes, "--dtype", target, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "ringcore.cli", "attend", *call, "--check", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=150, check=True, env=environment,
    )  # fmt: skip
    summary = json.loads(done.stdout)
    numbers = heads * rows * width
    sums = 0 if target == "float32" else 4 * numbers  # half types are summed in float32, beside the output
    assert summary["shard_bytes"] == 4 * numbers * np.dtype(DTYPES[target]).itemsize
    assert summary["peak_memory_bytes"] <= 1.1 * (summary["shard_bytes"] + sums + BASE + 2 * KERNELS)
