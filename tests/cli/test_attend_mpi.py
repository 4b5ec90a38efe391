"""``mpiexec -n P ringcore attend``: every rank reads and writes its own rows; all fail together, none hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DTYPES, TOLERANCES, load, lse_tolerance, qkv, save_safetensors
from dense import dense

pytestmark = pytest.mark.timeout(90)
LAUNCH = [str(Path(sys.executable).with_name("mpiexec")), "-n"]
COMMAND = [sys.executable, "-m", "ringcore.cli", "attend"]


def start(folder, ranks, *arguments, code=None):
    """The command on so many ranks; ``code`` runs first, on each of them."""
    command = COMMAND
    if code is not None:
        command = [sys.executable, "-c", f"{code}\nfrom ringcore.cli.main import run\nrun()", "attend"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_", "MPI_"))}
    environment |= {"OMP_NUM_THREADS": "1", "RINGCORE_TIMEOUT": "40"}
    return subprocess.Popen(
        [*LAUNCH, str(ranks), *command, *map(str, arguments)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def attend(folder, ranks, *arguments, code=None):
    """Its status, and what it said, less what the launcher adds."""
    with start(folder, ranks, *arguments, code=code) as process:
        out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def differences(came, due):
    assert np.array_equal(np.isneginf(came), np.isneginf(due))
    return np.abs(np.where(np.isneginf(due), 0, came) - np.where(np.isneginf(due), 0, due)).max()


def save(path, arrays, axes="bhsd"):
    save_safetensors(path, {n: x if axes == "bhsd" else x.swapaxes(1, 2) for n, x in zip("qkv", arrays, strict=True)})


@pytest.mark.parametrize(
    ("ranks", "dtype", "axes", "options", "keywords"),
    [
        (2, "float32", "bhsd", ["--causal"], {"causal": True}),
        (3, "float32", "bshd", ["--causal", "--layout", "striped"], {"causal": True}),
        (3, "bfloat16", "bhsd", ["--layout", "striped"], {}),
        (2, "bfloat16", "bshd", ["--window", "4,none"], {"window": (4, None)}),
        (2, "float16", "bshd", ["--causal", "--backend", "torch"], {"causal": True}),
        (2, "bfloat16", "bhsd", ["--causal", "--backend", "torch"], {"causal": True}),
        (3, "float64", "bhsd", ["--layout", "zigzag", "--softcap", "2", "--scale", "0.9"], {"softcap": 2.0, "scale": 0.9}),
        (2, "float32", "bhsd", ["--backend", "reference", "--key-lengths", "9,23", "--query-offset", "2,0", "--causal"],
         {"key_lengths": (9, 23), "query_offset": (2, 0), "causal": True}),
        (3, "float32", "bhsd", ["--dilated", "4:1,9:2,40:4", "--causal"],
         {"dilated": [(4, 1), (9, 2), (40, 4)], "causal": True}),
    ],
)  # fmt: skip
def test_ranks_agree_with_dense_attention(tmp_path, ranks, dtype, axes, options, keywords):
    arrays = qkv(dtype=dtype)
    save(tmp_path / "x.safetensors", arrays, axes)
    status, said, err = attend(
        tmp_path,
        ranks,
        "x.safetensors",
        "--out",
        "o.safetensors",
        "--lse",
        "--check",
        9,
        "--json",
        "--axes",
        axes,
        *options,
    )
    assert (status, err) == (0, "")
    out, lse = dense(*arrays, **keywords)
    came, came_dtype = load(tmp_path / "o.safetensors")
    assert came_dtype == dtype
    assert differences(came if axes == "bhsd" else came.swapaxes(1, 2), out) <= TOLERANCES[dtype]
    assert differences(load(tmp_path / "o.safetensors", "lse")[0], lse) <= lse_tolerance(dtype, options)
    summary = json.loads(said)
    assert (summary["ranks"], summary["processes"], summary["check"]["passed"]) == (ranks, ranks, True)
    due = "zigzag" if "--causal" in options else "contiguous"
    assert summary["layout"] == (options[options.index("--layout") + 1] if "--layout" in options else due)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.safetensors", "x.safetensors"]


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_bias_and_mask_rows_follow_the_layout(tmp_path, layout):
    rng = np.random.default_rng(3)
    arrays, bias, mask = qkv(), rng.normal(size=(4, 23, 23)).astype(np.float32), rng.random((2, 1, 23, 23)) > 0.3
    save(tmp_path / "x.safetensors", arrays)
    np.save(tmp_path / "bias.npy", bias)
    np.save(tmp_path / "mask.npy", mask)
    options = ["--bias", "bias.npy", "--mask", "mask.npy", "--layout", layout, "--check", 23, "--lse"]
    status, _, err = attend(tmp_path, 3, "x.safetensors", "--out", "o.safetensors", *options)
    assert (status, err) == (0, "")
    out, lse = dense(*arrays, bias=bias, mask=mask)
    assert differences(load(tmp_path / "o.safetensors")[0], out) <= 5e-6
    assert differences(load(tmp_path / "o.safetensors", "lse")[0], lse) <= 5e-6


def test_npy_files_converted_by_more_ranks_than_rows(tmp_path):
    arrays = qkv(rows=3, keys=2, dtype="float64")
    for name, x in zip("qkv", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", x)
    source = ["--q", "q.npy", "--k", "k.npy", "--v", "v.npy", "--dtype", "bfloat16", "--lse", "--check", 3]
    status, _, err = attend(tmp_path, 4, *source, "--out", "o.npy")
    assert (status, err) == (0, "")
    due, lse = dense(*(x.astype(DTYPES["bfloat16"]) for x in arrays))
    came, dtype = load(tmp_path / "o.npy")
    assert dtype == "bfloat16"
    assert differences(came, due) <= TOLERANCES["bfloat16"]
    assert differences(load(tmp_path / "o.lse.npy")[0], lse) <= 5e-6


def test_no_rank_reads_or_writes_the_rows_of_another(tmp_path):
    arrays = qkv(batch=1, heads=8, key_heads=8, rows=3000, keys=3000, width=64, values=64)
    save(tmp_path / "x.safetensors", arrays)
    code = (
        "import os, sys, ringcore.cli.tensors as t\nread, wrote, fill, pour = [0], [0], t._fill, t._pour\n"
        "def counted(d, view, *a): read[0] += len(view); fill(d, view, *a)\n"
        "def poured(d, view, *a): wrote[0] += len(view); pour(d, view, *a)\n"
        "t._fill, t._pour = counted, poured\nimport atexit\n"
        "atexit.register(lambda: open(f'{os.environ[\"PMI_RANK\"]}.count', 'w').write(f'{read[0]} {wrote[0]}'))"
    )
    status, _, err = attend(tmp_path, 3, "x.safetensors", "--out", "o.safetensors", "--causal", code=code)
    assert (status, err) == (0, "")
    third = arrays[0].nbytes // 3
    for rank in range(3):
        assert (tmp_path / f"{rank}.count").read_text() == f"{3 * third} {third}"


REFUSED = [
    (["x.safetensors", "--out", "there.safetensors"], "exists already"),
    (["none.safetensors", "--out", "o.safetensors"], "none.safetensors cannot be read"),
    (["cut.safetensors", "--out", "o.safetensors"], "truncated"),
    (["x.safetensors", "--out", "o.safetensors", "--ring-size", "2"], "--ring-size 2 emulates"),
    (["x.safetensors", "--out", "o.safetensors", "--colour", "red"], "No such option"),
    (["x.safetensors", "--out", "o.safetensors", "--key-lengths", "1"], "1 entries"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_one_message_for_wrong_usage(tmp_path, arguments, words):
    save(tmp_path / "x.safetensors", qkv())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    (tmp_path / "there.safetensors").write_bytes(b"kept")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    status, out, err = attend(tmp_path, 2, *arguments)
    assert (status, out) == (2, "")
    assert err.count("ringcore: error: ") == 1
    assert "Traceback" not in err
    assert words in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


ON_RANK_1 = "import os\nif os.environ['PMI_RANK'] == '1':\n"
FAILURES = {
    "a rank's disk fills up": (
        "    import ringcore.cli.output as o\n"
        "    def full(*a): raise OSError(28, 'No space left on device')\n    o.write_rows = full",
        "rank 1: o.safetensors takes",
    ),
    "a rank cannot read": (
        "    import ringcore.cli.attend as a\n"
        "    def broken(*a): raise OSError(5, 'Input/output error', 'x.safetensors')\n    a.read_rows = broken",
        "rank 1: x.safetensors: Input/output error",
    ),
    "a rank sees another file": (
        "    import ringcore.cli.request as r\n    from ringcore import FileError\n"
        "    def gone(path, name): raise FileError(f'{path} is gone')\n    r.open_tensor = gone",
        "rank 1: x.safetensors is gone",
    ),
    "a rank runs out of memory in the loop": (
        "    import ringcore_numpy.kernels as n\n"
        "    def full(*a, **k): raise MemoryError('so much')\n    n.NumpyKernels.forward = full",
        "rank 1 failed",
    ),
    "a rank fails after the loop": (
        "    from ringcore.merge import StandardArithmetic\n"
        "    def full(*a, **k): raise MemoryError('so much')\n    StandardArithmetic.finished = full",
        "rank 1 failed",
    ),
    "a rank is interrupted": (
        "    import ringcore_numpy.kernels as n\n"
        "    def stop(*a, **k): raise KeyboardInterrupt\n    n.NumpyKernels.forward = stop",
        "rank 1 failed",
    ),
    "a rank's kernels are wrong": (
        "    import ringcore_numpy.kernels as n\n    right = n.NumpyKernels.forward\n"
        "    def wrong(*a, **k):\n        part = right(*a, **k)\n        part.weighted[:, 0] *= 1.001\n        return part\n"
        "    n.NumpyKernels.forward = wrong",
        "the check failed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_rank_ends_all(tmp_path, name):
    code, words = FAILURES[name]
    save(tmp_path / "x.safetensors", qkv())
    begun = time.monotonic()
    status, _, err = attend(
        tmp_path, 3, "x.safetensors", "--out", "o.safetensors", "--check", 23, code=ON_RANK_1 + code
    )
    assert time.monotonic() - begun < 60
    assert status != 0
    assert words in err
    assert err.count("ringcore: error: ") == 1
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_leaves_nothing(tmp_path, sent):
    save(tmp_path / "x.safetensors", qkv(rows=30000, keys=30000, batch=1, heads=8, key_heads=1, width=64, values=64))
    with start(tmp_path, 2, "x.safetensors", "--out", "o.safetensors") as process:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("*.partial")) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.7)
        process.send_signal(sent)
        process.communicate(timeout=60)
    assert process.returncode != 0
    until = time.monotonic() + 20
    while list(tmp_path.glob("*.partial")) and time.monotonic() < until:
        time.sleep(0.05)  # the launcher may leave before its ranks
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_ranks_that_see_themselves_alone_do_not_all_write(tmp_path):
    save(tmp_path / "x.safetensors", qkv())
    # MPI must start before the variables are set, or it would look for the launcher.
    code = (
        "from mpi4py import MPI\nimport os\nos.environ.update(PMI_SIZE='2', PMI_RANK='0')\n"
        "from ringcore.cli.main import run\nrun()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "attend", "x.safetensors", "--out", "o.safetensors"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "each sees itself alone" in done.stderr
    assert not (tmp_path / "o.safetensors").exists()


def test_one_launched_rank_is_a_process_alone(tmp_path):
    save(tmp_path / "x.safetensors", qkv())
    status, out, err = attend(tmp_path, 1, "x.safetensors", "--out", "o.safetensors", "--ring-size", 2, "--check", 3)
    assert (status, err) == (0, "")
    assert "all in one process" in out
