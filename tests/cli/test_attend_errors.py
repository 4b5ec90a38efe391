"""What ``ringcore attend`` refuses or survives: one message, the right status, nothing left behind."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import qkv, save_safetensors

from ringcore import Partial
from ringcore.cli import attend, launcher, main
from ringcore.tile import ReferenceKernels

pytestmark = pytest.mark.timeout(60)
CALL = ["attend", "x.safetensors", "--out", "o.safetensors"]


@pytest.fixture(autouse=True)
def _inputs(tmp_path):
    q, k, v = qkv()
    save_safetensors(tmp_path / "x.safetensors", {"q": q, "k": k, "v": v})
    for name, x in (("q", q), ("k", k), ("v", v)):
        np.save(tmp_path / f"{name}.npy", x)
    save_safetensors(tmp_path / "shapes.safetensors", {"q": q, "k": k, "v": v[:, :, :-1]})
    save_safetensors(tmp_path / "flat.safetensors", {"q": q[0], "k": k[0], "v": v[0]})
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "tiny.safetensors").write_bytes(whole[:5])
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + whole[8:])
    (tmp_path / "bad.safetensors").write_bytes(whole[:8] + b"!" * (len(whole) - 8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "q.npy").read_bytes()[:-1])
    (tmp_path / "bad.npy").write_bytes(b"no numbers")
    np.save(tmp_path / "ints.npy", np.zeros((2, 4, 23, 5), np.int32))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(q))
    np.save(tmp_path / "rows.npy", np.zeros((7, 23), np.float32))
    np.save(tmp_path / "columns.npy", np.ones((23, 7), bool))
    (tmp_path / "there.safetensors").write_bytes(b"kept")
    (tmp_path / "folder.safetensors").mkdir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attend", "none.safetensors", "--out", "o.npy"], "none.safetensors cannot be read: No such file"),
        (["attend", "cut.safetensors", "--out", "o.npy"], "cut.safetensors is truncated"),
        (["attend", "tiny.safetensors", "--out", "o.npy"], "no whole .safetensors file"),
        (["attend", "long.safetensors", "--out", "o.npy"], "no whole .safetensors file"),
        (["attend", "bad.safetensors", "--out", "o.npy"], "damaged"),
        (["attend", "x.bin", "--out", "o.npy"], "cannot be read"),
        (["attend", "x.safetensors", "--q-name", "query", "--out", "o.npy"], "no tensor 'query'; it holds k, q, v"),
        (["attend", "shapes.safetensors", "--out", "o.npy"], "k and v must share heads and length"),
        (["attend", "flat.safetensors", "--out", "o.npy"], "q has 3 axes"),
        (["attend", "--q", "cut.npy", "--k", "k.npy", "--v", "v.npy", "--out", "o.npy"], "cut.npy is truncated"),
        (["attend", "--q", "bad.npy", "--k", "k.npy", "--v", "v.npy", "--out", "o.npy"], "no .npy file"),
        (["attend", "--q", "ints.npy", "--k", "k.npy", "--v", "v.npy", "--out", "o.npy"], "holds int32"),
        (["attend", "--q", "fortran.npy", "--k", "k.npy", "--v", "v.npy", "--out", "o.npy"], "Fortran order"),
        (["attend", "--q", "q.npy", "--k", "k.npy", "--out", "o.npy"], "--v is missing"),
        (["attend", "x.safetensors", "--q", "q.npy", "--out", "o.npy"], "came together"),
        (["attend", "q.npy", "--out", "o.npy"], "holds one array"),
        (["attend", "--out", "o.npy"], "--q, --k, --v is missing"),
        (["attend", "x.safetensors"], "--out"),
        (["attend", "x.safetensors", "--out", "o.txt"], "must end in .safetensors or .npy"),
        (["attend", "x.safetensors", "--out", "there.safetensors"], "exists already. Give --force"),
        (["attend", "x.safetensors", "--out", "x.safetensors", "--force"], "is an input"),
        (["attend", "x.safetensors", "--out", "folder.safetensors", "--force"], "is a folder"),
        (["attend", "x.safetensors", "--out", "nowhere/o.safetensors"], "nowhere is no folder"),
        (["attend", "x.safetensors", "--out", "o.npy", "--lse-out", "o.npy"], "both be written"),
        ([*CALL, "--lse-out", "l.npy"], "--lse-out is for .npy"),
        (["attend", "x.safetensors", "--out", "o.npy", "--lse-out", "l.txt"], "must end in .npy"),
        ([*CALL, "--dtype", "float8"], "--dtype is 'float8'"),
        ([*CALL, "--backend", "abacus"], "--backend is 'abacus'"),
        ([*CALL, "--kernels", "abacus"], "kernels is 'abacus'"),
        ([*CALL, "--backend", "torch", "--kernels", "numpy"], "cannot do this call"),
        ([*CALL, "--backend", "reference", "--kernels", "numpy"], "contradict"),
        ([*CALL, "--layout", "spiral"], "layout is 'spiral'"),
        ([*CALL, "--axes", "sbhd"], "axes is 'sbhd'"),
        ([*CALL, "--window", "3"], "for causal=True only"),
        ([*CALL, "--window", "3,x"], "no whole number"),
        ([*CALL, "--window", "1,2,3"], "LEFT,RIGHT"),
        ([*CALL, "--dilated", "4"], "LENGTH:RATE for each branch"),
        ([*CALL, "--dilated", "4:1,8:x"], "'x' is no whole number"),
        ([*CALL, "--dilated", "4:0"], "--dilated is '4:0'; lengths and rates must be 1 or more"),
        ([*CALL, "--dilated", "4:1", "--window", "2,1"], "--dilated and --window came together"),
        ([*CALL, "--dilated", "4:1", "--query-offset", "3"], "--dilated and --query-offset came together"),
        ([*CALL, "--dilated", "4:1", "--head-offset", "some"], "head_offset is 'some'"),
        ([*CALL, "--head-offset", "block"], "the branches of --dilated, which is missing"),
        ([*CALL, "--window", "-1,2"], "each side must be"),
        ([*CALL, "--scale", "nan"], "finite"),
        ([*CALL, "--softcap", "0"], "larger than 0"),
        ([*CALL, "--query-offset", "1,2,3"], "3 entries"),
        ([*CALL, "--key-lengths", "10"], "1 entries"),
        ([*CALL, "--key-lengths", "10,24"], "only 23 keys"),
        ([*CALL, "--bias", "rows.npy"], "its axis S must be 1 or q's 23"),
        ([*CALL, "--mask", "columns.npy"], "7 columns"),
        ([*CALL, "--mask", "rows.npy"], "must be bool"),
        ([*CALL, "--bias", "x.safetensors"], "must be a .npy file"),
        ([*CALL, "--ring-size", "0"], "--ring-size is 0"),
        ([*CALL, "--check", "-1"], "--check is -1"),
        ([*CALL, "--colour", "red"], "No such option"),
        ([*CALL, "--scale", "wide"], "--scale"),
        (["absorb"], "absorb"),
    ],
)  # fmt: skip
def test_wrong_usage_and_input_are_refused(refused, arguments, words):
    assert words in refused(2, *arguments)


def test_force_replaces_and_keeps_nothing_else(ringcore, tmp_path):
    before = set(tmp_path.iterdir())
    assert ringcore("attend", "x.safetensors", "--out", "there.safetensors", "--force").status == 0
    assert (tmp_path / "there.safetensors").stat().st_size > 1000
    assert set(tmp_path.iterdir()) == before


def test_force_keeps_the_old_output_if_the_call_fails(refused, monkeypatch):
    monkeypatch.setattr(attend, "ring_attention", _raiser(MemoryError("too much")))
    said = refused(1, "attend", "x.safetensors", "--out", "there.safetensors", "--force")
    assert "not enough memory" in said


class WrongKernels(ReferenceKernels):
    """Off by a little in one row of one head."""

    def forward(self, *arguments, **keywords):
        part = super().forward(*arguments, **keywords)
        weighted = part.weighted.copy()
        weighted[1, 2, 17] *= 1.0001
        return Partial(weighted, part.maximum, part.total)


class WrongSums(ReferenceKernels):
    """Out is right, lse is not."""

    def forward(self, *arguments, **keywords):
        part = super().forward(*arguments, **keywords)
        return Partial(part.weighted * 1.001, part.maximum, part.total * 1.001)


@pytest.mark.parametrize(
    ("kernels", "named", "lse"), [(WrongKernels, "out is off", []), (WrongSums, "lse is off", ["--lse"])]
)
def test_check_finds_wrong_kernels(refused, ringcore, monkeypatch, tmp_path, kernels, named, lse):
    monkeypatch.setattr("ringcore.cli.request.choose_kernels", lambda *_: (kernels(), []))
    said = refused(1, *CALL, "--check", "23", *lse)
    assert named in said
    assert "o.safetensors was not written" in said
    answer = ringcore(*CALL, "--check", "23", *lse)
    assert "FAILED: 23 rows" in answer.out
    assert json.loads(ringcore(*CALL, "--check", "23", "--json", *lse).out)["check"]["passed"] is False


def test_check_of_rows_that_are_right_passes_by_seed(ringcore, monkeypatch):
    monkeypatch.setattr("ringcore.cli.request.choose_kernels", lambda *_: (WrongKernels(), []))
    found = [ringcore(*CALL, "--check", "4", "--seed", seed, "--force").status for seed in range(12)]
    assert set(found) == {0, 1}


def test_check_reads_back_what_was_written(refused, monkeypatch):
    honest = attend._write

    def write(request, output, out, lse):
        out[0, 0, 3, 0] += 0.01
        honest(request, output, out, lse)

    monkeypatch.setattr(attend, "_write", write)
    assert "the check failed" in refused(1, *CALL, "--check", "23")


def test_a_full_disk_is_noticed_before_anything_is_computed(refused, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    monkeypatch.setattr(attend, "ring_attention", _raiser(AssertionError("computed")))
    said = refused(1, *CALL)
    assert "o.safetensors takes" in said
    assert "No space left on device" in said


def test_a_file_system_that_cannot_set_space_aside(ringcore, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", _raiser(OSError(errno.EOPNOTSUPP, "not supported")))
    assert ringcore(*CALL, "--check", "3").status == 0


def test_a_disk_that_fills_up_while_writing(refused, monkeypatch):
    monkeypatch.setattr("ringcore.cli.output.write_rows", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    assert "No space left on device" in refused(1, *CALL)


def test_two_outputs_are_named_both_or_not_at_all(refused, monkeypatch):
    honest, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error", str(target))
        honest(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert "Input/output error" in refused(1, "attend", "x.safetensors", "--out", "o.npy", "--lse")


def test_a_limit_on_file_sizes(tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); from ringcore.cli.main import run; run()"
    done = _process([sys.executable, "-c", code, *CALL], tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large" in done.stderr
    assert not list(tmp_path.glob("*o.safetensors*"))


def test_an_unexpected_error_shows_its_traceback_and_leaves_nothing(ringcore, monkeypatch, tmp_path):
    monkeypatch.setattr(attend, "ring_attention", _raiser(ZeroDivisionError("a bug")))
    before = set(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        ringcore(*CALL)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (main._Terminated, 143)])
def test_an_interrupted_call_leaves_nothing(ringcore, monkeypatch, tmp_path, error, status):
    monkeypatch.setattr(attend, "ring_attention", _raiser(error()))
    before = set(tmp_path.iterdir())
    answer = ringcore(*CALL)
    assert (answer.status, answer.err) == (status, "")
    assert set(tmp_path.iterdir()) == before


@pytest.fixture
def _heard():
    """Programs that are started here hear Ctrl-C, which a shell makes its background jobs ignore, children and all."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_computing(tmp_path, sent, status):
    q, k, v = qkv(rows=30000, keys=30000, batch=1, heads=8, key_heads=1, width=64, values=64)
    save_safetensors(tmp_path / "big.safetensors", {"q": q, "k": k, "v": v})
    before = set(tmp_path.iterdir())
    with subprocess.Popen(
        [sys.executable, "-m", "ringcore.cli", "attend", "big.safetensors", "--out", "o.safetensors"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        until = time.monotonic() + 60
        while not list(tmp_path.glob("*.partial")) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, "")
    assert set(tmp_path.iterdir()) == before


def test_too_little_memory_is_a_message(tmp_path):
    code = (
        "import resource; import numpy, ringcore.cli.attend as a; h = a.read_rows\n"
        "def read(*x): resource.setrlimit(resource.RLIMIT_AS, (1, 1)); numpy.empty(1 << 30)\n"
        "a.read_rows = read; from ringcore.cli.main import run; run()"
    )
    done = _process([sys.executable, "-c", code, *CALL], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("ringcore: error: there is not enough memory")
    assert not list(tmp_path.glob("*o.safetensors*"))


def test_launched_ranks_without_mpi4py_do_not_run_alone(refused, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    said = refused(2, *CALL)
    assert "started 3 ranks" in said
    assert 'pip install "ringcore[mpich]"' in said


def test_only_rank_0_speaks(ringcore, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setenv("PMI_RANK", "1")
    answer = ringcore(*CALL, "--check", "-1")
    assert (answer.status, answer.err, answer.out) == (2, "", "")


@pytest.mark.parametrize(
    ("environment", "size", "rank"),
    [
        ({}, 1, 0),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, 4, 3),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 2, 1),
        ({"PMIX_RANK": "5"}, 2, 5),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 1, 0),
        ({"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8"}, 8, 7),
    ],
)
def test_launchers_are_known_by_their_variables(environment, size, rank):
    assert (launcher.launched_size(environment), launcher.launched_rank(environment)) == (size, rank)


@pytest.mark.parametrize("missing", ["typer", "rich", "ml_dtypes"])
def test_a_missing_library_is_named_with_its_extra(refused, monkeypatch, tmp_path, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing or name == "ringcore.cli.commands"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "rich":  # typer is content without it; a progress bar is not
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    said = refused(2, *CALL, "--dtype", "bfloat16")
    assert missing in said
    assert 'pip install "ringcore[cli]"' in said


def test_a_missing_array_library_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refused(2, *CALL, "--backend", "torch")


def test_help_and_version(ringcore):
    assert "attend" in ringcore("--help").out
    assert "--query-offset" in ringcore("attend", "--help").out
    assert ringcore("--version").out.startswith("ringcore 0.")
    assert ringcore("--version").status == 0


def test_help_loads_no_array_library(tmp_path):
    code = (
        "import sys\nfrom ringcore.cli.main import run\ntry: run(['--help'])\n"
        "except SystemExit: print(sorted({'numpy', 'torch', 'mpi4py', 'safetensors'} & set(sys.modules)))"
    )
    done = _process([sys.executable, "-c", code], tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


def _process(command, folder):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI"))}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150, check=False
    )


def _raiser(error):
    def raise_it(*_, **__):
        raise error

    return raise_it
