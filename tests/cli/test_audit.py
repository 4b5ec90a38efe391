"""``ringcore audit``: functions that are right, wrong, or do what no function should do to its process."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ringcore.cli.auditing import ring_sizes

PLANTED = """
import os, sys, threading, time
import numpy as np
import ringcore


def right(q, k, v, *, ring_size, causal=False):
    print("words that nobody asked for")
    return ringcore.ring_attention(q, k, v, ring_size=ring_size, causal=causal)


def summed(q, k, v, *, ring_size):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    out = np.zeros_like(q)
    for keys, values in zip(np.array_split(k, ring_size, 2), np.array_split(v, ring_size, 2)):
        scores = q @ keys.swapaxes(2, 3) / q.shape[3] ** 0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out += weights / weights.sum(-1, keepdims=True) @ values
    return out


def misbehaving(q, k, v, *, ring_size):
    if ring_size == 2:
        os._exit(3)
    if ring_size == 3:
        time.sleep(600)
    if ring_size == 4:
        sys.exit(0)
    if ring_size == 5:
        raise RuntimeError("five is too many")
    if ring_size == 6:
        return right(q, k, v, ring_size=6)[:, :, 1:]
    return right(q, k, v, ring_size=ring_size)


def nothing_but_nan(q, k, v, *, ring_size):
    return np.full_like(q, np.nan)


def flash(q, k, v, causal=False, window_size=(-1, -1), softmax_scale=None):
    window = None if window_size == (-1, -1) else window_size
    return ringcore.ring_attention(q, k, v, causal=causal, window=window, scale=softmax_scale, axes="bshd")


def joined(q, k, v, *, ring, causal=False, window=None):
    return ringcore.ring_attention(q, k, v, ring=ring, causal=causal, window=window, layout="zigzag")


def its_own_keys_alone(q, k, v, *, group, is_causal=False, attn_mask=None):
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def waits_for_ever(q, k, v, *, ring):
    if ring.Get_rank() == 1:
        time.sleep(600)
    ring.Barrier()
    return q


def of_the_world(q, k, v, *, ring):
    from mpi4py import MPI

    after = (MPI.COMM_WORLD.Get_rank() + 1) % ring.Get_size()
    before = (MPI.COMM_WORLD.Get_rank() - 1) % ring.Get_size()
    found = ringcore.empty_partial(q, v.shape[3])
    for _ in range(ring.Get_size()):
        found = ringcore.merge(found, ringcore.ring_attention(q, k, v, ring_size=1, return_partial=True))
        k, v = ring.sendrecv((k, v), dest=after, source=before)
    return found.out


def sleeps(q, k, v, *, group):
    time.sleep(600)


def odd_rings_hang(q, k, v, *, ring_size):
    if ring_size % 2 and ring_size > 1:
        time.sleep(600)
    return right(q, k, v, ring_size=ring_size)


def as_reported(q, k, v, ring_size):
    import torch

    out = 0
    for keys, values in zip(k.tensor_split(ring_size, 1), v.tensor_split(ring_size, 1)):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / q.shape[-1] ** 0.5
        out = out + torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    return out


def dies_on_one_rank(q, k, v, *, ring):
    if ring.Get_rank() == 1:
        os._exit(9)
    ring.Barrier()
    return q


def one_rank_fails(q, k, v, *, ring):
    if (v == 1).all() and ring.Get_rank() == 1:  # and nobody waits for it
        time.sleep(600)
    if abs(q).max() > 200:
        if ring.Get_rank() == 1:
            raise ValueError("too large")
        ring.Barrier()
    return q


def leaves_a_thread(q, k, v, *, ring_size):
    threading.Thread(target=time.sleep, args=(600,)).start()
    return right(q, k, v, ring_size=ring_size)


def says_half_a_character(q, k, v, *, ring_size):
    raise ValueError(chr(0xDC80))


number = 5
"""
CUSTOM = """
ACCEPTS, LIBRARY = ("causal",), "numpy"


def attention(function, q, k, v, *, ring_size, causal=False):
    return function(q, k, v, ring_size=ring_size, causal=causal)
"""


@pytest.fixture
def audit(ringcore, tmp_path):
    """``audit("function", ...)`` of the planted ones: the answer and what its JSON says."""
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "custom.py").write_text(CUSTOM)

    def call(name, *options):
        target = name if ":" in name else f"planted:{name}"
        answer = ringcore("audit", target, "--json", "report.json", *options)
        path = tmp_path / "report.json"
        return answer, json.loads(path.read_text()) if path.exists() else None

    return call


def test_right_attention(audit):
    answer, report = audit("right", "--ranks", "1,3")
    assert answer.status == 0
    assert "right in all 18 answers" in answer.out
    assert (report["right"], report["asked"], report["diagnoses"], report["faults"]) == (True, 18, [], [])
    assert report["accepts"] == ["causal", "grouped"]
    assert max(each["error"] for each in report["errors"]) < 2e-6


@pytest.mark.parametrize("ranks", ["2", "3", "4", "8"])
def test_the_original_reports_mistake_has_its_name(audit, ranks):
    answer, report = audit("summed", "--ranks", ranks)
    assert answer.status == 1
    (found,) = report["diagnoses"]
    assert found["name"] == "softmax per chunk, summed over chunks"
    assert found["ring_sizes"] == [int(ranks)]
    (sums,) = report["sums_of_weights"]
    assert abs(sums["least"] - int(ranks)) < 1e-5 > abs(sums["largest"] - int(ranks))
    assert "softmax per chunk, summed over chunks: the weights of a row sum to the number" in answer.out


def test_a_page_with_a_picture(audit, tmp_path):
    answer, report = audit("summed", "--ranks", "1,3", "--html", "page.html")
    assert answer.status == 1
    written = (tmp_path / "page.html").read_text()
    assert written.startswith("<!doctype html>")
    assert "softmax per chunk, summed over chunks" in written
    assert written.count("<svg") == written.count("</svg>") == 1
    assert {name for name in ("The sum of each row", "The largest error", "Weights, ring of 3") if f"<!-- {name}" in written} == {
        "The sum of each row", "The largest error", "Weights, ring of 3",
    }  # fmt: skip
    ElementTree.fromstring(written[written.index("<svg") : written.index("</svg>") + 6])
    rows = {each["ring_size"]: each["rows"] for each in report["sums_of_weights"]}
    read = {each["ring_size"]: np.array(each["heads"]) for each in report["weights"]}
    assert {size: each.shape for size, each in read.items()} == {1: (2, 22, 22), 3: (2, 22, 22)}
    np.testing.assert_allclose(read[3].sum(-1), 3, rtol=1e-5)
    assert {size: len(sums) for size, sums in rows.items()} == {1: 44, 3: 44}
    np.testing.assert_allclose([rows[1], rows[3]], [[1] * 44, [3] * 44], rtol=1e-5)


def test_numbers_that_json_does_not_have_are_null(audit, tmp_path):
    answer, report = audit("nothing_but_nan", "--ranks", "2", "--html", "page.html")
    assert answer.status == 1
    written = (tmp_path / "report.json").read_text()
    assert not {word for word in ("NaN", "Infinity") if word in written}
    assert {each["error"] for each in report["errors"]} == {None}
    (found,) = report["diagnoses"]
    assert set(found["questions"]) == {each["question"] for each in report["errors"]}
    assert 'where asked "plain", ' in answer.out
    assert "not right, in no way that is known" in (tmp_path / "page.html").read_text()


def test_what_a_function_does_to_its_process_ends_no_audit(audit):
    answer, report = audit("misbehaving", "--ranks", "1,2,3,4,5,6", "--deadline", "8", "--only", "grouped")
    assert answer.status == 1
    said = {(each["ring_size"], each["what"]) for each in report["faults"]}
    assert {size for size, _ in said} == {2, 3, 4, 5, 6}
    assert any(size == 2 and "the process ended with status 3" in what for size, what in said)
    assert any(size == 3 and what.startswith("no answer within 8 s: it was at planted.py:") for size, what in said)
    assert {each["kind"] for each in report["faults"]} == {
        "the process ended", "no answer in time", "raised", "wrong shape",
    }  # fmt: skip
    assert any(size == 4 and "the process ended with status 0" in what for size, what in said)
    assert (5, "raised RuntimeError: five is too many") in said
    assert any(
        size == 6 and what.startswith("out has shape (1, 2, 21, 8), due is (1, 2, 22, 8)") for size, what in said
    )
    assert {each["ring_size"] for each in report["errors"]} == {1}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nothing:there", "No module named 'nothing'"),
        ("planted:missing", "missing"),
        ("planted:number", "must be a function"),
    ],
)
def test_what_cannot_be_imported_is_said(audit, target, words):
    answer, report = audit(target)
    assert answer.status == 1
    assert words in report["faults"][0]["what"]
    assert report["asked"] == 1


def test_functions_of_other_signatures(audit):
    pytest.importorskip("torch")
    answer, report = audit("torch.nn.functional:scaled_dot_product_attention", "--signature", "sdpa", "--ranks", "1")
    assert answer.status == 0
    assert report["accepts"] == ["causal", "scale", "mask", "bias", "grouped"]
    assert {each["result"] for each in report["errors"]} == {"out", "dq", "dk", "dv"}
    answer, report = audit("flash", "--signature", "flash-attn", "--ranks", "1")
    assert answer.status == 0
    assert report["accepts"] == ["causal", "window", "scale", "grouped"]
    answer, report = audit("right", "--signature", "custom.py", "--ranks", "2")
    assert (answer.status, report["accepts"]) == (0, ["causal"])


def launched():
    return any(variable in os.environ for variable in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK"))


@pytest.mark.skipif(launched(), reason="itself under mpiexec: ranks start no ranks")
def test_a_process_for_each_rank_under_mpiexec(audit):
    answer, report = audit("joined", "--launcher", "mpiexec", "--ranks", "1,2,3", "--layout", "zigzag")
    assert answer.status == 0, answer.out
    assert report["accepts"] == ["causal", "window", "grouped"]
    assert (report["asked"], report["launcher"]) == (31, "mpiexec")
    assert {each["question"] for each in report["errors"]} >= {"causal, in a group of other ranks"}
    answer, report = audit("joined", "--launcher", "mpiexec", "--ranks", "2")  # shards by another layout than it means
    assert answer.status == 1
    assert report["faults"] or report["diagnoses"]
    answer, report = audit("dies_on_one_rank", "--launcher", "mpiexec", "--ranks", "2", "--only", "grouped")
    assert {each["ring_size"] for each in report["faults"]} == {2}
    assert len(report["faults"]) == 8
    assert all("the process ended with status" in each["what"] for each in report["faults"])


@pytest.mark.skipif(launched(), reason="itself under mpiexec: ranks start no ranks")
def test_what_only_several_processes_show(audit):
    options = "--launcher", "mpiexec", "--ranks", "2"
    _, report = audit("waits_for_ever", *options, "--only", "grouped", "--deadline", "8")
    assert {each["kind"] for each in report["faults"]} == {"no answer in time"}
    where = report["faults"][0]["what"]
    assert where.startswith("no answer within 8 s: rank 0 was at planted.py:")
    assert "rank 1 was at planted.py:" in where
    assert "in waits_for_ever" in where
    _, report = audit("of_the_world", *options, "--only", "grouped", "--deadline", "10")
    (found,) = report["diagnoses"]
    assert found["name"] == "a global rank used for a group's rank"
    assert all(each["question"].endswith(", in a group of other ranks") for each in report["faults"])


def test_odd_rings_that_hang_are_told(audit):
    answer, report = audit("odd_rings_hang", "--ranks", "2,3", "--deadline", "8", "--only", "grouped")
    (found,) = report["diagnoses"]
    assert (found["name"], found["ring_sizes"]) == ("odd rings wait for ever", [3])
    assert (found["error"], found["fit"]) == (None, None)
    *hung, said = (each["what"] for each in report["faults"])
    assert [each.partition(":")[0] for each in hung[:2]] == ["no answer within 8 s"] * 2
    assert {*hung[2:], said} == {"not asked, after two questions without an answer"}
    assert "odd rings wait for ever: no answer on rings of an odd number of ranks alone (on rings of 3)" in answer.out


@pytest.mark.parametrize("ranks", ["2", "3", "4", "8"])
def test_the_original_report_by_its_own_signature(audit, ranks):
    pytest.importorskip("torch")
    _, report = audit("as_reported", "--signature", "seed", "--ranks", ranks)
    assert [each["name"] for each in report["diagnoses"]] == ["softmax per chunk, summed over chunks"]
    assert report["library"] == "torch"
    assert set(report["versions"]) == {"python", "ringcore", "torch"}


def test_a_device_that_arrays_of_a_library_are_never_on(audit):
    answer, report = audit("right", "--device", "cuda", "--ranks", "1")
    assert answer.status == 1
    assert "device is 'cuda'; arrays of numpy are on cpu" in report["faults"][0]["what"]


def test_a_process_for_each_rank_under_torchrun(audit):
    pytest.importorskip("torch")
    options = "--signature", "sdpa", "--launcher", "torchrun", "--ranks", "2", "--length", "24", "--only", "causal"
    answer, report = audit("its_own_keys_alone", *options)
    assert answer.status == 1
    (found,) = report["diagnoses"]
    assert found["name"] == "no ring at all"
    assert found["results"] == ["out", "dq", "dk", "dv"]


def test_ranks_under_torchrun_that_hang_are_ended(audit, tmp_path):
    pytest.importorskip("torch")
    options = "--launcher", "torchrun", "--ranks", "2", "--library", "torch", "--only", "grouped", "--deadline", "15"
    _, report = audit("sleeps", *options)
    assert "rank 1 was at planted.py" in report["faults"][0]["what"]
    time.sleep(0.5)
    assert running_in(tmp_path) == [str(os.getpid())]


def running_in(folder):
    """The processes that have this folder for their own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [process.name] if (process / "cwd").readlink() == folder else []
    return found


@pytest.fixture
def _heard():
    """Programs that are started here hear Ctrl-C, which a shell makes its background jobs ignore, children and all."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard", "audit")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_worker_and_no_file(tmp_path, sent, status):
    files = tmp_path / "files"
    files.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "ringcore.cli", "audit", "planted:misbehaving", "--ranks", "3"], cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(files)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        until = time.monotonic() + 60
        while not list(files.glob("*/begun.json")) and time.monotonic() < until:
            time.sleep(0.02)
        assert len(running_in(tmp_path)) == 3  # this one, the command, and its worker
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (status, "")
    assert running_in(tmp_path) == [str(os.getpid())]
    assert list(files.iterdir()) == []


def test_a_worker_that_has_answered_all_and_does_not_end_is_ended(audit, tmp_path):
    answer, report = audit("leaves_a_thread", "--ranks", "2", "--deadline", "30")
    assert answer.status == 0, answer.out
    assert report["asked"] == 8
    assert running_in(tmp_path) == [str(os.getpid())]


def test_a_target_whose_process_never_ends_well_is_audited_to_the_end(audit, tmp_path):
    (tmp_path / "leaving.py").write_text(
        "import atexit, os\nfrom planted import right\natexit.register(lambda: os._exit(3))\n"
    )
    answer, report = audit("leaving:right", "--ranks", "2")
    assert answer.status == 1
    (fault,) = report["faults"]
    assert fault["what"].startswith("the process ended with status 3")
    assert report["asked"] == 9


@pytest.mark.skipif(launched(), reason="itself under mpiexec: ranks start no ranks")
def test_what_one_rank_does_is_put_down_to_its_question(audit):
    options = "--launcher", "mpiexec", "--ranks", "2", "--only", "grouped", "--deadline", "8"
    _, report = audit("one_rank_fails", *options)
    asleep, waiting, raised, *rest = report["faults"]
    assert asleep["question"] == "v of ones, so that out is the sum of weights"
    assert asleep["what"].startswith("no answer within 8 s: rank 0 answered; rank 1 was at planted.py:")
    assert waiting["question"] == raised["question"] == "scores 128 times as large"
    assert waiting["what"].startswith("no answer within 8 s: rank 0 was at planted.py:")
    assert waiting["what"].endswith("; rank 1 raised")
    assert raised["what"] == "rank 1: raised ValueError: too large"
    assert {each["what"] for each in rest} == {"not asked, after two questions without an answer"}
    assert {each["question"] for each in report["errors"]} == {"plain", "grouped heads", "scores 8 times as large"}


def test_only_what_the_function_takes_is_asked_for(audit):
    answer, report = audit("right", "--only", "causal,window")
    assert answer.status == 1
    assert "--only holds 'window', but planted:right takes causal, grouped." in report["faults"][0]["what"]


def test_words_that_the_terminal_has_no_bytes_for_are_written_all_the_same(audit, tmp_path):
    answer, report = audit("says_half_a_character", "--ranks", "1", "--html", "page.html")
    assert answer.status == 1
    assert "\\udc80" in answer.out
    assert "\\udc80" in (tmp_path / "page.html").read_text()
    assert report["faults"][0]["what"] == "raised ValueError: \udc80"


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_reports_that_cannot_be_written_are_refused_before_anything_is_asked(refused, tmp_path, monkeypatch, option):
    monkeypatch.setattr("ringcore.cli.auditing.audit", lambda spec: pytest.fail("asked"))
    said = refused(2, "audit", "planted:right", option, "nowhere/report")
    assert said == "ringcore: error: the report cannot be written to nowhere/report: there is no folder nowhere.\n"
    assert "it is a folder" in refused(2, "audit", "planted:right", option, ".")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "permission denied" in refused(2, "audit", "planted:right", option, "report")


def test_a_report_that_cannot_be_written_in_the_end_is_printed(ringcore, audit, tmp_path, monkeypatch):
    monkeypatch.setattr("ringcore.cli.auditing._check_written", lambda path: None)
    answer = ringcore("audit", "planted:nothing_but_nan", "--ranks", "1", "--json", "nowhere/report.json")
    assert answer.status == 2
    assert "not right, in no way that is known" in answer.out


def test_a_library_that_sees_no_gpu_says_so(audit):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    answer, report = audit("right", "--library", "torch", "--device", "cuda")
    assert answer.status == 1
    assert "device is 'cuda', but torch sees no GPU here." in report["faults"][0]["what"]


def test_a_signature_that_lacks_something_is_told_what(audit, tmp_path):
    (tmp_path / "empty.py").write_text("LIBRARY = 'numpy'")
    _, report = audit("right", "--signature", "empty.py")
    assert "empty.py has no attention and no ACCEPTS; a signature's file must have" in report["faults"][0]["what"]
    (tmp_path / "custom.py").write_text(CUSTOM.replace('("causal",)', '("causal", "colour")'))
    _, report = audit("right", "--signature", "custom.py")
    assert "accepts holds 'colour'; it must hold some of causal" in report["faults"][0]["what"]


def test_ring_sizes_are_asked_once_each():
    assert ring_sizes("2, 1,2") == (2, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--launcher", "rocket"), "--launcher is 'rocket'; it must be one of local, mpiexec, torchrun"),
        (("--layout", "spiral"), "--layout is 'spiral'"),
        (("--length", "4"), "--length is 4"),
        (("--ranks", "1,zero"), "--ranks is '1,zero'"),
        (("--signature", "nowhere.py"), "--signature is 'nowhere.py'; it must be one of ringcore, sdpa, flash-attn"),
        (("--library", "fortran"), "--library is 'fortran'"),
        (("--dtype", "int8"), "--dtype is 'int8'"),
        (("--device", "abacus"), "--device is 'abacus'; it must be one of cpu, cuda"),
        (("--only", "causal,colour"), "--only holds 'colour'"),
        (("--deadline", "0"), "--deadline is 0"),
        (("--deadline", "inf"), "--deadline is inf"),
        (("--deadline", "nan"), "--deadline is nan"),
        (("--deadline", "1e12"), "--deadline is 1e+12; it must be a number of seconds above 0, up to 1e+06"),
        (("--ranks", "²"), "--ranks is '²'"),
        (("--library", "numpy", "--device", "cuda"), "--device is 'cuda'; arrays of numpy are on cpu."),
    ],
)
def test_wrong_usage(ringcore, options, words):
    answer = ringcore("audit", "planted:right", *options)
    assert answer.status == 2
    assert words in answer.err


def test_it_runs_in_the_python_that_runs_the_command(audit):
    assert sys.executable
    answer, _ = audit("ringcore:ring_attention", "--ranks", "2")
    assert "right in all 19 answers" in answer.out
