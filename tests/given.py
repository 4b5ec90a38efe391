"""Seeded arrays, other libraries, and what it means that a call is refused."""

import numpy as np
import pytest

import ringcore
from ringcore import DeviceError, DtypeError, KeywordError, LayoutError, ShapeError, UnsupportedError

BUILT_IN = {
    DeviceError: ValueError,
    DtypeError: TypeError,
    KeywordError: ValueError,
    LayoutError: ValueError,
    ShapeError: ValueError,
    UnsupportedError: NotImplementedError,
}


def arrays(seed=0, dtype="float64", batch=2, heads=4, key_heads=2, queries=6, keys=6, width=4, value_width=3):
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (batch, heads, queries, width),
        "k": (batch, key_heads, keys, width),
        "v": (batch, key_heads, keys, value_width),
        "dout": (batch, heads, queries, value_width),
        "dlse": (batch, heads, queries),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


GIVEN = arrays()
Q, K, V = GIVEN["q"], GIVEN["k"], GIVEN["v"]


def refused(call, error, said):
    """The call raises just this error, a built-in one too, and its message holds all that is due."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, BUILT_IN[error])
    assert isinstance(caught.value, ringcore.RingcoreError)
    for words in said:
        assert words in str(caught.value)


def strict():
    return pytest.importorskip("array_api_strict")


def torch():
    return pytest.importorskip("torch")
