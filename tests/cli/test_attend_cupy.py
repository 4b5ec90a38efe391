"""``ringcore attend --backend cupy`` over a stand-in for CuPy: whole shards on a GPU, and shards in pieces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TOLERANCES, load, lse_tolerance, qkv, save_safetensors
from dense import dense

pytestmark = pytest.mark.timeout(90)
STAND_IN = Path(__file__).parents[1] / "cupy_stand_in"
LAUNCH = [str(Path(sys.executable).with_name("mpiexec")), "-n"]
COMMAND = [sys.executable, "-P", "-m", "ringcore.cli", "attend"]


def attend(folder, *arguments, ranks=1, **variables):
    """Its status, and what it said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "MPI_"))}
    environment |= {"OMP_NUM_THREADS": "1", "RINGCORE_TIMEOUT": "40", "PYTHONPATH": str(STAND_IN), **variables}
    launch = [*LAUNCH, str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [*launch, *COMMAND, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=150,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def save(folder, arrays, axes="bhsd"):
    tensors = {name: x if axes == "bhsd" else x.swapaxes(1, 2) for name, x in zip("qkv", arrays, strict=True)}
    save_safetensors(folder / "x.safetensors", tensors)


def difference(came, due):
    assert np.array_equal(np.isneginf(came), np.isneginf(due))
    return np.abs(np.where(np.isneginf(due), 0, came) - np.where(np.isneginf(due), 0, due)).max()


def attended(folder, arrays, *options, axes="bhsd", dtype="float32", ranks=1, **keywords):
    """The summary of a call whose out and lse are those of dense attention."""
    save(folder, arrays, axes)
    status, said, err = attend(
        folder, "x.safetensors", "--out", "o.safetensors", "--lse", "--json", "--backend", "cupy", "--axes", axes,
        "--check", 9, *options, ranks=ranks,
    )  # fmt: skip
    assert status == 0, err
    due, due_lse = dense(*arrays, **keywords)
    came = load(folder / "o.safetensors")[0]
    assert difference(came if axes == "bhsd" else came.swapaxes(1, 2), due) <= TOLERANCES[dtype]
    assert difference(load(folder / "o.safetensors", "lse")[0], due_lse) <= lse_tolerance(dtype, ("torch",))
    return json.loads(said)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", ["bhsd", "bshd"])
def test_whole_arrays(tmp_path, dtype, axes):
    summary = attended(tmp_path, qkv(dtype=dtype), "--causal", dtype=dtype, axes=axes, causal=True)
    assert (summary["backend"], summary["transport"]) == ("cupy", "none")


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_ring_of_gpus(tmp_path, dtype, ranks):
    arrays = qkv(rows=61, keys=61, dtype=dtype)
    summary = attended(tmp_path, arrays, "--causal", ranks=ranks, dtype=dtype, causal=True)
    assert "CUDA IPC" in summary["transport"]
    assert summary["bytes_shared"] > 0


PIECES = ["--device-memory", "12KB"]  # of some 30 KB


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ([], {}),
        (["--causal"], {"causal": True}),
        (["--window", "3,1"], {"window": (3, 1)}),
        (["--window", "2", "--causal"], {"window": 2, "causal": True}),
        (["--query-offset", "3,-9", "--causal"], {"query_offset": (3, -9), "causal": True}),
        (["--key-lengths", "10,0"], {"key_lengths": (10, 0)}),
        (["--softcap", "1.5", "--scale", "0.7"], {"softcap": 1.5, "scale": 0.7}),
        (["--dilated", "7:1,20:3"], {"dilated": [(7, 1), (20, 3)]}),
    ],
    ids=" ".join,
)
def test_pieces_of_shards_that_are_too_large(tmp_path, options, keywords):
    summary = attended(tmp_path, qkv(rows=61, keys=61), *PIECES, *options, **keywords)
    assert "in pieces of" in summary["transport"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("axes", ["bhsd", "bshd"])
def test_pieces_of_every_dtype_and_order(tmp_path, dtype, axes):
    arrays = qkv(rows=50, keys=71, dtype=dtype)
    summary = attended(tmp_path, arrays, *PIECES, "--causal", dtype=dtype, axes=axes, causal=True)
    assert "in pieces of" in summary["transport"]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_reads_what_it_needs(tmp_path, ranks, layout):
    arrays = qkv(rows=61, keys=61)
    summary = attended(tmp_path, arrays, *PIECES, "--causal", "--layout", layout, ranks=ranks, causal=True)
    assert summary["bytes_sent"] == summary["bytes_shared"] == 0


def test_the_rows_of_bias_and_mask_go_with_their_piece(tmp_path):
    rng = np.random.default_rng(2)
    bias, mask = rng.normal(size=(1, 4, 61, 61)).astype(np.float32), rng.random((2, 1, 61, 61)) < 0.7
    np.save(tmp_path / "bias.npy", bias)
    np.save(tmp_path / "mask.npy", mask)
    terms = ["--bias", "bias.npy", "--mask", "mask.npy"]
    attended(tmp_path, qkv(rows=61, keys=61), "--device-memory", "30KB", *terms, bias=bias, mask=mask)


def test_a_bias_beyond_the_range_of_scores_hides_nothing(tmp_path):
    """Bias of float64 over q of float32: what is below all float32 is their lowest number, not -inf."""
    bias = np.full((61, 61), -1e300)
    np.save(tmp_path / "bias.npy", bias)
    arrays = qkv(rows=61, keys=61)
    save(tmp_path, arrays)
    arguments = ["x.safetensors", "--lse", "--backend", "cupy", "--bias", "bias.npy"]
    for name, more in (("whole", []), ("pieces", ["--device-memory", "30KB"])):
        status, said, err = attend(tmp_path, *arguments, "--out", f"{name}.safetensors", *more)
        assert status == 0, err
        assert ("in pieces of" in said) == (name == "pieces")
    for name in ("out", "lse"):
        whole, pieces = (load(tmp_path / f"{kind}.safetensors", name)[0] for kind in ("whole", "pieces"))
        assert np.isfinite(whole).all()
        assert difference(pieces, whole) <= TOLERANCES["float32"] * np.abs(whole).max()


def test_no_more_of_the_gpu_is_taken_than_was_said(tmp_path):
    """Of wide heads, beside which scores are small."""
    arrays = qkv(rows=400, keys=400, width=512, values=512)
    save(tmp_path, arrays)
    code = (
        "import atexit, cupy; pool = cupy.cuda.pool; room = pool.malloc; most = [0]\n"
        "def malloc(size):\n    found = room(size); most[0] = max(most[0], pool.used_bytes()); return found\n"
        "pool.malloc = malloc; atexit.register(lambda: print(most[0]))\n"
        "from ringcore.cli.main import run; run()"
    )
    arguments = ["attend", "x.safetensors", "--out", "o.npy", "--quiet", "--backend", "cupy"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments, "--device-memory", "2MB"], cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": str(STAND_IN)}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert 500_000 < int(done.stdout) < 2_000_000 < sum(x.nbytes for x in arrays)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "numpy", "--device-memory", "1GB"], "the backend is numpy"),
        (["--backend", "cupy", "--device-memory", "much"], "must be a size such as 40GiB"),
        (["--backend", "cupy", "--device-memory", "0"], "must be a size such as 40GiB"),
        (["--backend", "cupy", "--device-memory", "100"], "one query and one key take .* of 100 can be used"),
        (["--backend", "cupy", "--device-memory", "12KB", "--ring-size", "2"], "--ring-size 2 emulates a ring of whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, options, words):
    save(tmp_path, qkv(rows=61, keys=61))
    status, said, err = attend(tmp_path, "x.safetensors", "--out", "o.npy", *options)
    assert (status, said, err.count("\n")) == (2, "", 1)
    assert __import__("re").search(words, err), err
    assert not (tmp_path / "o.npy").exists()


def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    save(tmp_path, qkv())
    status, _, err = attend(tmp_path, "x.safetensors", "--out", "o.npy", "--backend", "cupy", CUPY_STAND_IN_DEVICES="0")
    assert (status, err.count("\n")) == (2, 1)
    assert "--backend cupy needs a GPU" in err


def test_a_file_that_ends_while_it_is_read(tmp_path):
    arrays = qkv(rows=61, keys=61)
    save(tmp_path, arrays)
    code = (
        "import ringcore.cli.streaming as s\nfrom ringcore.errors import FileError\nread = s._Files._read\n"
        "def gone(self, runs, k, v):\n    if runs[0].start: raise FileError('the file is gone')\n    read(self, runs, k, v)\n"
        "s._Files._read = gone\nfrom ringcore.cli.main import run; run()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "attend", "x.safetensors", "--out", "o.npy", "--backend", "cupy", *PIECES],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(STAND_IN)}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "ringcore: error: the file is gone\n")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
