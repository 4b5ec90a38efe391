"""`ringcore.testing` asks of CuPy's arrays what it asks of NumPy's."""

import cupy
import pytest

import ringcore
from ringcore.testing import ACCEPTS, ask, check_attention
from ringcore.testing.libraries import library_of


def test_ringcore_passes_on_cupy():
    accepts = set(ACCEPTS) - {"dilated"}
    report = check_attention(ringcore.ring_attention, library="cupy", accepts=accepts, ring_sizes=(1, 3))
    assert {result for *_, result in report.errors} == {"out"}


def test_a_mistake_has_its_name_there_too():
    def attention(q, k, v, *, ring_size, causal=False):
        return ringcore.ring_attention(q, k, v, ring_size=ring_size)

    found = ask(attention, library="cupy", accepts=("causal",), ring_sizes=(2,))
    assert [each.disease.name for each in found.diagnoses] == ["causal ignored"]


def test_each_rank_has_its_device():
    count, before = cupy.cuda.runtime.getDeviceCount(), cupy.cuda.Device()
    try:
        library_of("cupy", "float32").settle(count + 1)
        assert cupy.cuda.Device().id == 1 % count
    finally:
        before.use()


def test_a_report_can_name_the_gpu():
    name = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    assert library_of("cupy", "float32").gpu() == name


def test_its_arrays_are_never_on_the_cpu():
    with pytest.raises(ValueError, match="device is 'cpu'; arrays of cupy are on cuda"):
        ask(ringcore.ring_attention, library="cupy", device="cpu")
