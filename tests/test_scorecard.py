"""The scorecard: its table is what its reports say, its cards are complete, and what stands in for flash_attn is right."""

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ringcore.testing import Shape, ask, draw, problem_of, right
from ringcore.testing.dense import lse_of
from ringcore.testing.signatures import attention_of, signature_of

sys.path.append(str(Path(__file__).parent.parent / "docs" / "audit"))
sys.path.append(str(Path(__file__).parent.parent / "docs" / "audit" / "signatures"))

import score

AUDIT = Path(__file__).parent.parent / "docs" / "audit"
CARDS = {card["name"]: card for card in score.CARDS["card"]}


def test_the_table_is_what_the_reports_say():
    assert score.table() in (AUDIT / "README.md").read_text()


def test_every_card_has_its_report_and_no_other_is_there():
    assert {path.stem for path in (AUDIT / "reports").glob("*.json")} == set(CARDS)
    assert {card["environment"] for card in CARDS.values()} == set(score.CARDS["environment"])


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_its_report_is_of(name):
    command, report = shlex.split(CARDS[name]["command"]), json.loads((AUDIT / "reports" / f"{name}.json").read_text())
    told = dict(pairwise(command))
    assert report["target"] == command[2]
    assert report["ring_sizes"] == [int(size) for size in told["--ranks"].split(",")]
    assert report["dtype"] == told.get("--dtype", "float32")
    assert report["launcher"] == told.get("--launcher", "local")
    assert report["signature"] == told.get("--signature", "ringcore")
    assert report["signature"] in ("ringcore", "sdpa", "jax") or (AUDIT / report["signature"]).is_file()
    assert report["asked"] > 0
    assert report["versions"]


def test_all_that_is_ringcore_is_right():
    wrong = [name for name in CARDS if name.startswith("ringcore") and not score.report_of(CARDS[name])["right"]]
    assert wrong == []


def test_a_card_that_needs_more_gpus_than_there_are_is_passed_by_and_said_so(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(score, "run", lambda card, folder: ran.append(card["name"]))
    monkeypatch.setattr(score, "gpus", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["score.py", "run"])
    score.main()
    assert set(CARDS) - set(ran) == {name for name, card in CARDS.items() if card.get("gpus", 0) > 1}
    assert "ringcore-torch-cuda" in ran
    assert "ringcore-torch-gpus: not run; it needs GPUs, 4 of them, and there are 1" in capsys.readouterr().out


def test_gpus_are_those_that_the_driver_lists(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert score.gpus() == 0
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU 0: one (UUID: GPU-1)"\necho "GPU 1: another (UUID: GPU-2)"\n')
    program.chmod(0o755)
    assert score.gpus() == 2


@pytest.mark.parametrize(("asked", "due"), [("cpu", "flash_attn_on_cpu"), ("gpu", "flash_attn_stand_in")])
def test_the_environment_says_what_stands_in_for_flash_attn(monkeypatch, asked, due):
    pytest.importorskip("torch")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "ring_flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("FLASH_ATTN", asked)
    import flash_attn_here

    before = dict(sys.modules), list(sys.path)
    try:
        flash_attn_here.install()
        from flash_attn import __version__, flash_attn_func
        from flash_attn.flash_attn_interface import _flash_attn_forward

        assert flash_attn_func.__module__ == _flash_attn_forward.__module__ == due
        assert __version__ == "2.8.3"
    finally:
        sys.path[:] = before[1]
        for name in set(sys.modules) - set(before[0]):
            if name.partition(".")[0] in ("flash_attn", "ring_flash_attn"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def stand_in():
    pytest.importorskip("torch")
    import flash_attn_on_cpu

    return flash_attn_on_cpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_stands_in_for_flash_attn_is_attention(stand_in, dtype):
    attention, accepts, library, _ = attention_of(stand_in.flash_attn_func, signature_of("flash-attn"))
    accepts = set(accepts) - {"alibi"}
    assert accepts == {"causal", "window", "scale", "softcap", "grouped"}
    report = ask(attention, accepts=accepts, library=library, dtype=dtype, ring_sizes=(1,))
    assert report.right, str(report)
    assert {result for *_, result in report.errors} == {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3)])
def test_it_counts_from_the_lower_right_corner_and_gives_infinite_lse_where_nothing_is_seen(stand_in, queries, keys):
    import torch

    shape = Shape(2, 4, 2, queries, keys, 8, 8)
    arrays, _ = draw("plain", np.random.default_rng(0), shape, "float16")
    problem = problem_of(arrays, {"causal": True, "query_offset": keys - queries})
    q, k, v = (torch.from_numpy(arrays[name]).transpose(1, 2) for name in "qkv")
    plain = 0.0, 8**-0.5, True, -1, -1, 0.0, None, False
    out, lse, *_ = stand_in._flash_attn_forward(q, k, v, *plain)
    np.testing.assert_allclose(out.transpose(1, 2), right(problem).out, atol=2e-3)
    due = lse_of(problem.scores)[..., 0]
    assert np.isinf(due).any() == (queries > keys)
    np.testing.assert_allclose(lse, np.where(np.isneginf(due), np.inf, due), atol=2e-3)


def test_its_packed_sequences_are_those_one_by_one(stand_in):
    import torch

    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(9, heads, 8).half() for heads in (4, 2, 2, 4))
    ends, plain = torch.tensor([0, 4, 9]), (0.0, 0.3, True, -1, -1, 0.0, None)
    out, lse, *_ = stand_in._flash_attn_varlen_forward(q, k, v, ends, ends, 5, 5, *plain, False)
    found = [torch.empty_like(x) for x in (q, k, v)]
    stand_in._flash_attn_varlen_backward(dout, q, k, v, out, lse, *found, ends, ends, 5, 5, *plain)
    for part in (slice(0, 4), slice(4, 9)):
        one = [x[None, part] for x in (q, k, v)]
        its, its_lse, *_ = stand_in._flash_attn_forward(*one, *plain, False)
        gradients = [torch.empty_like(x) for x in one]
        stand_in._flash_attn_backward(dout[None, part], *one, its, its_lse, *gradients, *plain, False)
        assert torch.equal(out[part], its[0])
        assert torch.equal(lse[:, part], its_lse[0])
        assert all(torch.equal(x[part], y[0]) for x, y in zip(found, gradients, strict=True))


def test_it_refuses_what_flash_attn_does_not_take_and_what_it_lacks(stand_in):
    import torch

    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        stand_in.flash_attn_func(q, q, q)
    with pytest.raises(NotImplementedError, match="neither dropout nor alibi"):
        stand_in.flash_attn_func(q.half(), q.half(), q.half(), dropout_p=0.1)
