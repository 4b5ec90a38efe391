"""Rows that a copy engine takes from one block to another, and in how many calls."""

import cupy
import numpy as np
import pytest

from ringcore import Spec
from ringcore_cupy import device_blocks

BATCH, HEADS, HEIGHT, WIDTH = 3, 2, 12, 5
CASES = {
    "neighbours": (range(2, 9), 7, range(7), 1),
    "neighbours to a larger block": (range(2, 9), 20, range(4, 11), 1),
    "one row": (range(2, 3), 4, range(3, 4), 1),
    "one row of a step": (range(2, 5, 3), 4, range(1, 4, 3), 1),
    "every third": (range(1, 12, 3), 4, range(4), BATCH),
    "to every second": (range(1, 5), 9, range(1, 9, 2), BATCH),
    "a step to another": (range(0, 12, 4), 9, range(1, 7, 2), BATCH),
    "none": (range(0), 4, range(0), 0),
}


@pytest.mark.parametrize("pitch", [2**31 - 1, 0])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_copied(monkeypatch, case, pitch):
    """With a pitch too large for the GPU, by a call for each piece."""
    rows, length, places, due = CASES[case]
    monkeypatch.setattr(device_blocks, "_LARGEST_PITCH", pitch)
    calls = []
    for name in ("memcpyAsync", "memcpy2DAsync"):
        make = getattr(cupy.cuda.runtime, name)
        monkeypatch.setattr(cupy.cuda.runtime, name, lambda *given, make=make: calls.append(given) or make(*given))
    numbers = np.random.default_rng(0).standard_normal((BATCH, HEIGHT, HEADS, WIDTH)).astype("float32")
    source, target = cupy.asarray(numbers), cupy.zeros((BATCH, length, HEADS, WIDTH), "float32")
    spec = Spec((BATCH, HEADS, HEIGHT, WIDTH), source, source.dtype)
    stream = cupy.cuda.get_current_stream()
    device_blocks.copy_rows(target.data.ptr, source.data.ptr, spec, rows, length, places, stream)
    expected = np.zeros((BATCH, length, HEADS, WIDTH), "float32")
    for place, row in zip(places, rows, strict=True):
        expected[:, place] = numbers[:, row]
    np.testing.assert_array_equal(target.get(), expected)
    if pitch:
        assert len(calls) == due
