"""The progress bar: kernels that report slab by slab are the kernels, and the bar ends where it should."""

import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from conftest import load, qkv, save_safetensors
from dense import dense

import ringcore
from ringcore.cli.progress import ReportingKernels
from ringcore.cli.visible import pairs_of_rows
from ringcore.tile import ReferenceKernels
from ringcore_numpy import NumpyKernels

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("kernels", [NumpyKernels(), ReferenceKernels()], ids=["numpy", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("ring_size", [1, 3])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"causal": True},
        {"window": (4, 2)},
        {"causal": True, "query_offset": (-30, 2)},
        {"key_lengths": (5, 23)},
        {"bias": True, "mask": True, "softcap": 2.0, "causal": True},
    ],
    ids=str,
)
def test_reporting_kernels_are_the_kernels(kernels, layout, ring_size, keywords):
    q, k, v = qkv()
    rng = np.random.default_rng(2)
    keywords = dict(keywords)
    if keywords.get("bias"):
        keywords |= {"bias": rng.normal(size=(4, 23, 23)).astype(np.float32), "mask": rng.random((1, 23)) > 0.2}
    told = []
    reporting = ReportingKernels(kernels, told.append, slabs=5, least_rows=1)
    out, lse = ringcore.ring_attention(
        q, k, v, ring_size=ring_size, layout=layout, kernels=reporting, return_lse=True, **keywords
    )
    due_out, due_lse = dense(q, k, v, **keywords)
    np.testing.assert_allclose(out, due_out, rtol=0, atol=5e-6)
    np.testing.assert_allclose(lse, due_lse, rtol=0, atol=5e-6)
    offset = keywords.get("query_offset", 0)
    pairs = pairs_of_rows(
        [range(23)], 23, causal=keywords.get("causal", False), window=keywords.get("window", (None, None)),
        offsets=(offset, offset) if isinstance(offset, int) else offset, key_lengths=keywords.get("key_lengths"),
    )  # fmt: skip
    assert sum(told) == 4 * pairs
    assert len(told) > 1


def test_pairs_of_dilated_attention_are_told_as_often_as_branches_show_them():
    q, k, v = qkv()
    branches = {"segment_lengths": (5, 9, 40), "dilation_rates": (1, 2, 4), "causal": True}
    told = []
    reporting = ReportingKernels(NumpyKernels(), told.append, slabs=5, least_rows=1)
    out = ringcore.dilated_attention(q, k, v, ring_size=3, layout="zigzag", kernels=reporting, **branches)
    np.testing.assert_allclose(out, ringcore.dilated_attention(q, k, v, **branches), rtol=0, atol=5e-6)
    batch, heads, length = q.shape[:3]
    head, i, j = np.arange(heads)[:, None, None], np.arange(length)[:, None], np.arange(length)
    assert sum(told) == batch * sum(
        int(((i // w == j // w) & (i % w % r == head % r) & (j % w % r == head % r) & (j <= i)).sum())
        for w, r in zip((5, 9, 40), (1, 2, 4), strict=True)
    )


@pytest.mark.parametrize("ring_size", [1, 3])
def test_reporting_fused_kernels_are_the_kernels(ring_size):
    """Their half results are added to, slab by slab, in float32."""
    torch = pytest.importorskip("torch")
    from ringcore_torch import FlashCpu

    q, k, v = (torch.from_numpy(x).bfloat16().requires_grad_() for x in qkv())
    reporting = ReportingKernels(FlashCpu(), int, slabs=5, least_rows=1)
    out = ringcore.ring_attention(q, k, v, ring_size=ring_size, layout="zigzag", causal=True, kernels=reporting)
    due, _ = dense(*(x.detach().double().numpy() for x in (q, k, v)), causal=True)
    np.testing.assert_allclose(out.detach().double().numpy(), due, rtol=0, atol=2e-2)
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_slabs_have_equal_visible_areas():
    q, k, v = qkv(rows=4000, keys=4000, batch=1, heads=1, key_heads=1)
    told = []
    ringcore.ring_attention(q, k, v, causal=True, kernels=ReportingKernels(NumpyKernels(), told.append, slabs=4))
    assert len(told) == 4
    assert max(told) < 1.05 * min(told)


def test_gradients_pass_through():
    q, k, v = qkv()
    (out, _), pullback = ringcore.ring_attention_vjp(q, k, v, kernels=ReportingKernels(NumpyKernels(), int, 5, 1))
    (_, _), due = ringcore.ring_attention_vjp(q, k, v)
    for came, expected in zip(pullback(np.ones_like(out)), due(np.ones_like(out)), strict=True):
        np.testing.assert_allclose(came, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_a_bar_and_the_rest_does_not(tmp_path, quiet):
    arrays = qkv(rows=3000, keys=3000, batch=1, heads=2, key_heads=1)
    save_safetensors(tmp_path / "x.safetensors", dict(zip("qkv", arrays, strict=True)))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ringcore.cli", "attend", "x.safetensors", "--out", "o.safetensors", "--causal"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PMI")} | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*command, "--check", "20", *(["--quiet"] if quiet else [])],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, env=environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        out, _ = process.communicate(timeout=90)
    os.close(ours)
    assert process.returncode == 0
    if quiet:
        assert (shown, out) == (b"", b"")
    else:
        assert b"attention" in shown
        assert b"left" in shown
        assert b"passed: 20 rows" in out
        assert b"\x1b" not in out
    assert load(tmp_path / "o.safetensors")[0].shape == (1, 2, 3000, 3)
