"""Small inputs as files, and the command run in this process."""

import os
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ringcore.cli.main import run

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
TOLERANCES = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 5e-6, "float64": 1e-12}


def lse_tolerance(dtype, options):
    """lse is kept wide, but Torch's fused kernels take exp of half types to about 14 bits."""
    if "torch" in options and dtype in ("float16", "bfloat16"):
        return 2e-4
    return 1e-12 if dtype == "float64" else 5e-6


@dataclass
class Answer:
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No launcher's variables, whatever started the tests."""
    for name in list(os.environ):
        if name.startswith(("PMI", "OMPI_", "MPI_LOCAL", "SLURM_")):
            monkeypatch.delenv(name)


@pytest.fixture
def ringcore(capsys, tmp_path, monkeypatch):
    """``ringcore("attend", ...)`` within an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Answer(stopped.value.code, said.out, said.err)

    return call


@pytest.fixture
def refused(ringcore, tmp_path):
    """The command must fail: one message, its status, and no file more than before."""

    def call(status, *arguments) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        answer = ringcore(*arguments)
        assert answer.status == status, answer
        assert answer.err.startswith("ringcore: error: ")
        assert answer.err.count("\n") == 1
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return answer.err

    return call


def qkv(seed=1, batch=2, heads=4, key_heads=2, rows=23, keys=23, width=5, values=3, dtype="float32"):
    """Random q, k, v as [B, H, S, D]."""
    rng = np.random.default_rng(seed)
    shapes = (batch, heads, rows, width), (batch, key_heads, keys, width), (batch, key_heads, keys, values)
    return [rng.normal(size=shape).astype(DTYPES[dtype]) for shape in shapes]


def save_safetensors(path, tensors):
    """Write arrays by the format's own library, which takes the memory as it lies."""
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)


def load(path, name="out"):
    """The tensor as float64, and its dtype's name, read by the format's own library."""
    x = np.load(path) if path.suffix == ".npy" else safetensors.numpy.load_file(path)[name]
    x = x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x
    return x.astype(np.float64), x.dtype.name
