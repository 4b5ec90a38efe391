"""Graphs of the cuDNN frontend: what is asked of cuDNN, what is kept, and what is missing."""

from __future__ import annotations

import gc
import threading

import fake_cudnn
import pytest
from fake_cudnn import adapter

from ringcore import Band, MissingDependency, UnsupportedError

ROWS = 16, 8, 1


def operands(rows=24, keys=40):
    shapes = {
        "q": (1, 2, rows, 16), "k": (1, 2, keys, 16), "v": (1, 2, keys, 16), "out": (1, 2, rows, 16),
        "lse": (1, 2, rows, 1),
    }  # fmt: skip
    found = []
    for name, (batch, heads, height, width) in shapes.items():
        strides = (heads * height * width, height * width, width, 1)
        found.append((name, (batch, heads, height, width), strides, "float32" if width == 1 else "float16"))
    return tuple(found)


def addresses(problem, kept=[]):  # noqa: B006  # the memory must outlive the call
    import torch

    found = []
    for _, shape, _, dtype in problem.operands:
        kept.append(torch.zeros(shape, dtype=getattr(torch, dtype)))
        found.append(kept[-1].data_ptr())
    return tuple(found)


def run(engine, problem, device=0, stream=7):
    memory = bytearray(64)
    engine.run(problem, addresses(problem), device=device, stream=stream, allocate=lambda size: (size, memory))


@pytest.mark.parametrize(("band", "due"), [
    (Band(), {}),
    (Band(None, 0), {"diagonal_band_right_bound": 0}),
    (Band(None, 9), {"diagonal_band_right_bound": 9}),
    (Band(0, None), {"diagonal_band_left_bound": 1}),
    (Band(-4, 2), {"diagonal_band_left_bound": 5, "diagonal_band_right_bound": 2}),
])  # fmt: skip
def test_bands_are_bounds_around_the_diagonal(cudnn, band, due):
    from ringcore_cudnn.graphs import bounds

    came = bounds(band)
    if due:
        assert came.pop("diagonal_alignment") == cudnn.diagonal_alignment.TOP_LEFT
    assert came == due


@pytest.mark.parametrize("band", [Band(1, 3), Band(None, -1)])
def test_bands_beside_the_diagonal_are_refused(cudnn, band):
    from ringcore_cudnn.graphs import bounds

    with pytest.raises(UnsupportedError, match="hold the diagonal"):
        bounds(band)


def test_equal_problems_share_a_graph_and_others_do_not(cudnn):
    from ringcore_cudnn import Engine, Problem

    engine = Engine()
    for scale in (0.5, 0.25, 0.5):
        for band in (Band(), Band(None, 0)):
            run(engine, Problem(operands(), scale, band))
    run(engine, Problem(operands(rows=32), 0.5))
    assert len(cudnn.built) == 5
    assert len(cudnn.runs) == 7
    assert len(cudnn.handles) == 1


def test_addresses_go_straight_to_cudnn_where_the_frontend_lets_them():
    for inside, described in ((True, 0), (False, 2)):
        with adapter(inside=inside) as cudnn:
            from ringcore_cudnn import Engine, Problem

            engine = Engine()
            for _ in range(2):
                run(engine, Problem(operands(), 0.5))
            assert len(cudnn.runs) == 2
            assert cudnn.described == described


def test_graphs_of_the_frontends_own_kernels_are_run_by_the_frontend(cudnn, monkeypatch):
    from ringcore_cudnn import Engine, Problem

    monkeypatch.setattr(fake_cudnn.Graph, "selected_engine", "sdpa_fwd_prefill_sm100")
    run(Engine(), Problem(operands(), 0.5))
    assert cudnn.described == 1


def test_operands_that_the_frontend_does_not_know_of_are_not_sorted_by_guess(cudnn, monkeypatch):
    from ringcore_cudnn import Engine, Problem

    monkeypatch.setattr(fake_cudnn.Native, "_get_variant_pack_uids_sorted", lambda self: [*self.uids, 99])
    run(Engine(), Problem(operands(), 0.5))
    assert cudnn.described == 1


def test_the_graphs_that_ran_longest_ago_go_first(cudnn):
    from ringcore_cudnn import Engine, Problem

    engine = Engine(kept=2)
    for scale in (1.0, 2.0, 1.0, 3.0, 1.0):
        run(engine, Problem(operands(), scale))
    assert len(cudnn.built) == 3
    run(engine, Problem(operands(), 2.0))
    assert len(cudnn.built) == 4


def test_stream_and_workspace_reach_cudnn(cudnn):
    from ringcore_cudnn import Engine, Problem

    engine = Engine()
    run(engine, Problem(operands(), 1.0), stream=7)
    run(engine, Problem(operands(), 1.0), stream=8)
    assert [(stream, workspace) for _, _, stream, workspace in cudnn.runs] == [(7, 48), (8, 48)]


def test_each_device_and_thread_has_a_handle_and_a_thread_that_ends_leaves_it(cudnn):
    from ringcore_cudnn import Engine, Problem

    engine = Engine()

    def elsewhere():
        run(engine, Problem(operands(), 1.0))

    def thread():
        started = threading.Thread(target=elsewhere)
        started.start()
        started.join()
        gc.collect()

    run(engine, Problem(operands(), 1.0), device=0)
    run(engine, Problem(operands(), 1.0), device=1)
    assert len(cudnn.handles) == 2
    for _ in range(3):
        thread()
    assert len(cudnn.handles) == 3
    assert len({id(handle) for _, handle, _, _ in cudnn.runs}) == 3


def test_what_cudnn_cannot_do_is_our_error(cudnn):
    from ringcore_cudnn import Engine, Problem

    with pytest.raises(UnsupportedError, match=r"cuDNN 91900 has no kernel for attention of q \[1, 2, 1, 16\] float16"):
        run(Engine(), Problem(operands(rows=1, keys=1), 1.0))


def test_a_missing_library_is_our_error_with_a_hint(cudnn):
    def absent():
        raise RuntimeError("Unable to find symbol cudnnGetVersion")

    cudnn.backend_version = absent
    from ringcore_cudnn import Engine

    with pytest.raises(MissingDependency, match="pip install nvidia-cudnn-cu13"):
        Engine()


def test_a_library_that_is_too_old_is_refused(cudnn):
    cudnn.backend_version = lambda: 91001
    from ringcore_cudnn import Engine

    with pytest.raises(UnsupportedError, match="cuDNN is 91001"):
        Engine()


def test_without_gpus_the_kernels_are_passed_over(cudnn):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    from ringcore_cudnn.torch_arrays import load

    with pytest.raises(UnsupportedError, match="compute capability 8 or more"):
        load()


def test_the_package_imports_no_array_library():
    import subprocess
    import sys

    program = (
        "import sys, types; sys.modules['cudnn'] = types.ModuleType('cudnn'); import ringcore_cudnn; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=150
    )
    assert not set(done.stdout.split()) & {"torch", "cupy", "numpy"}
