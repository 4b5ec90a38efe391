"""Which tiles' gradients cuDNN's kernels in Torch leave to FlashAttention-2; what comes of it needs a GPU."""

import pytest
import torch

from ringcore import Band
from ringcore_torch.aten_cuda import Cudnn, Flash2


def pull_back(rows, keys):
    q, k = (torch.zeros((1, 2, length, 8), dtype=torch.float16) for length in (rows, keys))
    return Cudnn().pull_back(q, q, k, k, q, torch.zeros((1, 2, rows)), Band(), 1.0)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 128), (64, 64), (128, 192), (100, 300)])
def test_tiles_whose_end_cudnn_does_not_hide_go_to_flash2(monkeypatch, rows, keys):
    monkeypatch.setattr(Flash2, "pull_back", lambda *_: "dq, dk, dv")
    assert pull_back(rows, keys) == "dq, dk, dv"


def test_so_do_all_where_gradients_must_be_equal_from_run_to_run(monkeypatch):
    monkeypatch.setattr(Flash2, "pull_back", lambda *_: "dq, dk, dv")
    torch.use_deterministic_algorithms(True)
    try:
        assert pull_back(256, 256) == "dq, dk, dv"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("rows", "keys"), [(2, 128), (100, 256), (384, 384)])
def test_others_stay_with_cudnn(rows, keys):
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_cudnn_attention_backward"):
        pull_back(rows, keys)
