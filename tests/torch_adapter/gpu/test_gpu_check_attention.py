"""`ringcore.testing` asks of tensors on a GPU what it asks of those in host memory."""

import json

import pytest
from typer.testing import CliRunner

import ringcore
from ringcore.cli.commands import app
from ringcore.testing import ACCEPTS, ask, check_attention

ALL = tuple(name for name in ACCEPTS if name != "dilated")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ringcore_passes(dtype):
    report = check_attention(
        ringcore.ring_attention, library="torch", device="cuda", dtype=dtype, accepts=ALL, ring_sizes=(1, 3)
    )
    assert {result for *_, result in report.errors} == {"out", "dq", "dk", "dv"}


def test_a_mistake_has_its_name_there_too():
    def attention(q, k, v, *, ring_size, causal=False):
        assert q.is_cuda
        return ringcore.ring_attention(q, k, v, ring_size=ring_size)

    found = ask(attention, library="torch", device="cuda", accepts=("causal",), ring_sizes=(2,))
    assert [each.disease.name for each in found.diagnoses] == ["causal ignored"]


def test_the_report_names_the_gpu(tmp_path):
    import torch

    path = tmp_path / "report.json"
    asked = ["audit", "ringcore:ring_attention", "--library", "torch", "--device", "cuda", "--ranks", "1"]
    CliRunner().invoke(app, [*asked, "--only", "causal", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["right"]
    assert report["versions"]["gpu"] == torch.cuda.get_device_name()
