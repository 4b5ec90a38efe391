"""cuDNN's frontend on a GPU: masks, widths, determinism, streams, threads and captured graphs."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from against_dense import check, draw

import ringcore

pytestmark = pytest.mark.timeout(300)
FRONTEND = "torch.cuda.cudnn_frontend"


def randoms(*shape):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(9), device="cuda")


MASKS = {
    "pairs": lambda: {"mask": randoms(2, 4, 301, 301) < 0.6},
    "pairs, causal": lambda: {"mask": randoms(1, 1, 301, 301) < 0.6, "causal": True},
    "rows": lambda: {"mask": randoms(1, 4, 301, 1) < 0.6},
    "keys": lambda: {"mask": randoms(2, 1, 1, 301) < 0.6, "window": (70, 0)},
    "empty rows": lambda: {
        "mask": (randoms(2, 1, 301, 301) < 0.5) & (torch.arange(301, device="cuda") % 7 > 0)[:, None]
    },
    "none seen": lambda: {"mask": torch.zeros((1, 1, 301, 301), dtype=torch.bool, device="cuda")},
    "first blocks hidden": lambda: {"mask": (randoms(1, 1, 301, 301) < 0.5) & (torch.arange(301, device="cuda") > 200)},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "layout"), [(1, "contiguous"), (2, "zigzag"), (3, "striped")])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, size, layout, dtype):
    check(FRONTEND, dtype, (2, 4, 2, 301, 301, 64, 64), size, layout, "bshd", **MASKS[name]())


@pytest.mark.parametrize("size", [1, 2])
def test_nan_in_a_query_is_not_hidden(size):
    q, k, v = draw(torch.bfloat16, 2, 4, 2, 301, 301, 64, 64)
    q[:, :, 7] = torch.nan
    out = ringcore.ring_attention(q, k, v, kernels=FRONTEND, ring_size=size, **MASKS["pairs"]())
    assert out[:, :, 7].isnan().all()
    assert out[:, :, 8:].isfinite().all()


def test_a_bias_is_not_for_it():
    q, k, v = draw(torch.bfloat16, 1, 2, 2, 64, 64, 64, 64)
    with pytest.raises(ringcore.UnsupportedError, match="they have no bias"):
        ringcore.ring_attention(q, k, v, bias=torch.zeros((64, 64), device="cuda"), kernels=FRONTEND)


@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (192, 128), (40, 72), (256, 256), (8, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_widths(widths, masked):
    terms = {"mask": randoms(2, 1, 130, 130) < 0.6} if masked else {"causal": True}
    check(FRONTEND, torch.bfloat16, (2, 4, 2, 130, 130, *widths), 2, "zigzag", **terms)


def test_single_rows_and_keys():
    check(FRONTEND, torch.float16, (1, 2, 1, 3, 3, 64, 64), 3, causal=True)
    check(FRONTEND, torch.float16, (1, 2, 1, 3, 3, 64, 64), 3, mask=randoms(3, 3) < 0.6)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_equal_from_run_to_run_where_that_is_wanted(masked):
    q, k, v = draw(torch.bfloat16, 1, 8, 2, 2000, 2000, 128, 128)
    mask = randoms(1, 1, 2000, 2000) < 0.6 if masked else None
    dout = torch.randn(q.shape, generator=torch.Generator("cuda").manual_seed(8), device="cuda").to(q.dtype)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(5):
            _, pullback = ringcore.ring_attention_vjp(q, k, v, kernels=FRONTEND, causal=True, mask=mask)
            runs.append(pullback(dout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def test_other_streams_threads_and_captured_graphs():
    q, k, v = draw(torch.bfloat16, 1, 4, 2, 300, 300, 64, 64)
    mask = randoms(1, 1, 300, 300) < 0.6
    call = lambda: ringcore.ring_attention(q, k, v, kernels=FRONTEND, mask=mask)  # noqa: E731
    due, found = call(), []

    def elsewhere():
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(call())
            torch.cuda.current_stream().synchronize()

    threads = [Thread(target=elsewhere) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(x, due) for x in found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, due)
