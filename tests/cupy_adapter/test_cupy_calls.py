"""What a call makes of CuPy's arrays before anything is computed."""

import cupy
import numpy as np
import pytest

import ringcore
from ringcore.call import Call

KEYWORDS = {
    "ring": None, "ring_size": None, "causal": True, "window": None, "scale": None, "softcap": None, "query_offset": 0,
    "key_lengths": None, "layout": "contiguous", "axes": "bhsd", "kernels": None,
}  # fmt: skip


def test_a_call_remembers_what_it_found_out(monkeypatch):
    q = cupy.asarray(np.ones((1, 2, 8, 4), np.float32))
    chosen = []
    choose = Call.choose
    monkeypatch.setattr(Call, "choose", lambda self, *arrays: chosen.append(1) or choose(self, *arrays))
    call = Call("ring_attention", **KEYWORDS)
    for _ in range(3):
        call.prepare(ringcore.Inputs(q, q, q)).forward()
    assert len(chosen) == 1


@pytest.mark.parametrize("kernels", [None, "reference"])
@pytest.mark.parametrize("function", [ringcore.ring_attention, ringcore.ring_attention_vjp])
def test_arrays_on_another_gpu_than_the_current_one_are_refused(function, kernels):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs 2 GPUs")
    with cupy.cuda.Device(1):
        q = cupy.asarray(np.ones((1, 2, 8, 4), np.float32))
        function(q, q, q, kernels=kernels)
    with pytest.raises(ringcore.UnsupportedError, match=r"on GPU 1, but GPU 0 .* Call cupy\.cuda\.Device\(1\)\.use"):
        function(q, q, q, kernels=kernels)
