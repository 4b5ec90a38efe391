"""What cuDNN's adapter does to CuPy's arrays around its kernels, over the stand-in or on a GPU; cuDNN itself is not run."""

import sys
from types import ModuleType

import cupy
import ml_dtypes
import numpy as np
import pytest


@pytest.fixture
def arrays(monkeypatch):
    planted = "cudnn" not in sys.modules
    if planted:
        monkeypatch.setitem(sys.modules, "cudnn", ModuleType("cudnn"))  # to be imported, no more
    from ringcore_cudnn.cupy_arrays import CupyArrays

    yield CupyArrays()
    if planted:  # what has imported it must not be found by others
        for name in [name for name in sys.modules if name.partition(".")[0] == "ringcore_cudnn"]:
            del sys.modules[name]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_mask_leaves_half_types_as_they_are(arrays, dtype):
    from ringcore_cudnn.hiding import added, normalised, seen_alone

    rng = np.random.default_rng(3)
    q, k = (cupy.asarray(rng.standard_normal((2, 4, rows, 8)).astype(dtype)) for rows in (5, 6))
    mask = rng.random((2, 1, 5, 6)) < 0.5
    mask[..., 2] = False
    term = added(arrays, q, cupy.asarray(mask), 6)
    assert (term.dtype, term.shape) == (q.dtype, mask.shape)
    assert np.array_equal(term.get().astype(float), np.where(mask, 0.0, -np.inf))
    (seen,) = seen_alone(arrays, cupy.asarray(mask), k)
    assert seen.dtype == k.dtype
    due = np.where(mask.any((1, 2))[:, None, :, None], k.get().astype(float), 0.0)
    assert np.array_equal(seen.get().astype(float), due)
    lse = np.where(rng.random((2, 4, 5)) < 0.3, -np.inf, 1.0).astype(np.float32)
    part = normalised(arrays, q, cupy.asarray(lse))
    assert part.weighted.dtype == q.dtype
    due = np.where(np.isinf(lse)[..., None], 0.0, q.get().astype(float))
    assert np.array_equal(part.weighted.get().astype(float), due)
