"""What a ring of processes must refuse on every rank when one rank is wrong or differs, whatever carries its blocks."""

import numpy as np
import pytest
from shards import problem

import ringcore
from ringcore import (
    AgreementError,
    DtypeError,
    KeywordError,
    LayoutError,
    PeerError,
    RingcoreError,
    ShapeError,
    UnsupportedError,
)

LENGTH = 12
EVERY = slice(None)


def task_of(transport, **keywords):
    return problem(transport.size, "contiguous", LENGTH, heads=(4, 2), width=6, **keywords)


def given(transport, changes, different, convert=lambda x: x):
    """This rank's arguments of a right call, or with ``changes``: values, or functions of the right NumPy arrays."""
    names = dict(zip("qkv", task_of(transport).shards(transport.rank), strict=True))
    if different:
        names |= {name: change(names.get(name)) if callable(change) else change for name, change in changes.items()}

    def converted(x):
        if isinstance(x, tuple):
            return tuple(map(converted, x))
        return convert(x) if isinstance(x, np.ndarray) else x

    return {name: converted(x) for name, x in names.items()}


def failure(call):
    with pytest.raises(RingcoreError) as caught:
        call()
    return caught.value


def check_refusal(error, transport, odd, due, said):
    """The odd rank has its own error, and all others hear of it."""
    if transport.rank == odd:
        assert type(error) is due
    else:
        assert type(error) is PeerError
        assert f"rank {odd} refused the call, so rank {transport.rank} did too: {due.__name__}" in str(error)
    assert said in str(error)


def check_disagreement(error, transport, odd, name):
    assert type(error) is AgreementError
    other = odd or 1
    assert f"the ranks disagree on {name}: " in str(error)
    assert f"on rank {other}. Every rank must make the same call" in str(error)


def cut(*index):
    return lambda x: x[index]


WRONG = {
    "axes of q": ({"q": lambda x: x[0]}, ShapeError, "q has 3 axes"),
    "axes of k": ({"k": lambda x: x[None]}, ShapeError, "k has 5 axes"),
    "rows of v": ({"v": lambda x: x[:, :, 1:]}, ShapeError, "k and v must share"),
    "batch of k": ({"k": lambda x: x[:1]}, ShapeError, "share the batch size"),
    "heads": ({"q": lambda x: x[:, :3]}, ShapeError, "q has 3 heads"),
    "integers": ({"q": lambda x: x.astype(int)}, DtypeError, "q holds int64"),
    "complex": ({"v": lambda x: x + 0j}, DtypeError, "v holds complex128"),
    "mixed dtypes": ({"k": lambda x: x.astype("float32")}, DtypeError, "k: float32"),
    "list": ({"q": lambda x: x.tolist()}, DtypeError, "q is a list"),
    "nothing": ({"v": lambda x: None}, DtypeError, "v is a NoneType"),
    "masked array": ({"k": np.ma.array}, UnsupportedError, "k is a masked array"),
    "scale NaN": ({"scale": float("nan")}, KeywordError, "scale is nan"),
    "scale text": ({"scale": "0.5"}, KeywordError, "scale is '0.5'"),
    "softcap 0": ({"softcap": 0.0}, KeywordError, "softcap is 0.0"),
    "window negative": ({"window": (-1, 2)}, KeywordError, "window is (-1, 2)"),
    "window number": ({"window": 3}, KeywordError, "causal=True only"),
    "causal": ({"causal": "yes"}, KeywordError, "causal is 'yes'"),
    "layout": ({"layout": "spiral"}, LayoutError, "layout is 'spiral'"),
    "axes": ({"axes": "bhds"}, KeywordError, "axes is 'bhds'"),
    "key lengths": ({"key_lengths": [-1, 3]}, KeywordError, "key_lengths is [-1, 3]"),
    "query offset": ({"query_offset": 0.5}, KeywordError, "query_offset is 0.5"),
    "kernels unknown": ({"kernels": "fast"}, KeywordError, "kernels is 'fast'"),
    "kernels of nothing": ({"kernels": 3}, KeywordError, "kernels is 3"),
    "bias axes": ({"bias": np.zeros(LENGTH)}, ShapeError, "bias has 1 axes"),
    "bias rows": ({"bias": np.zeros((LENGTH + 1, LENGTH))}, ShapeError, f"bias has shape ({LENGTH + 1}, {LENGTH})"),
    "bias integers": ({"bias": np.zeros((1, LENGTH), int)}, DtypeError, "bias holds int64"),
    "mask integers": ({"mask": np.zeros((1, LENGTH), int)}, DtypeError, "mask holds int64"),
    "cu_seqlens that begin late": ({"cu_seqlens": [1, LENGTH]}, KeywordError, "cu_seqlens is [1, 12]"),
    "cu_seqlens that fall": ({"cu_seqlens": [0, 8, 5, LENGTH]}, KeywordError, "goes from 8 to 5"),
    "documents of numbers": ({"documents": [0.5] * LENGTH}, KeywordError, "documents is [0.5"),
    "documents of three entries": ({"documents": [[0] * LENGTH] * 3}, KeywordError, "documents has 3 rows"),
    "documents twice": ({"documents": [0] * LENGTH, "cu_seqlens": [0, LENGTH]}, KeywordError, "came together"),
    "sinks of another length": ({"sinks": np.zeros(3)}, ShapeError, "sinks has shape (3,)"),
    "sinks of integers": ({"sinks": np.zeros(4, int)}, DtypeError, "sinks holds int64"),
    "mask of positions of numbers": (
        {"mask": lambda _: lambda i, j: i - j},
        DtypeError,
        "a function of positions, gave int64",
    ),
    "mask of positions of a shape": (
        {"mask": lambda _: lambda i, j: (i == i) & (j[:, :1] == j[:, :2])},
        ShapeError,
        "a function of positions, gave shape",
    ),
    "alibi of another length": ({"alibi": np.zeros(3)}, ShapeError, "alibi has shape (3,)"),
    "dropout of all": ({"dropout": 1.0, "dropout_seed": 1}, KeywordError, "dropout is 1.0"),
    "dropout without a seed": ({"dropout": 0.5}, KeywordError, "there is no dropout_seed"),
    "prefix of one array": ({"prefix": np.zeros((2, 2, 3, 6))}, KeywordError, "prefix must hold two arrays"),
    "prefix of another width": ({"prefix": (np.zeros((2, 2, 3, 5)),) * 2}, ShapeError, "the k of prefix has shape"),
    "reduce_replicated": ({"reduce_replicated": "yes"}, KeywordError, "reduce_replicated is 'yes'"),
    "layout that is too late": ({"layout": "auto"}, LayoutError, "the shards were dealt before"),
    "layout of q": ({"q_layout": "spiral"}, LayoutError, "q_layout is 'spiral'"),
    "ring size": ({"ring_size": 2}, KeywordError, "ring_size=2 came together"),
}
WRONG_OF_VJP = {
    "wrt unknown": ({"wrt": ("x",)}, KeywordError, "wrt is ('x',)"),
    "wrt empty": ({"wrt": ()}, KeywordError, "wrt is ()"),
    "wrt nothing": ({"wrt": None}, KeywordError, "wrt is None"),
    "wrt of a bias": ({"wrt": ("q", "bias")}, KeywordError, "there is no bias"),
    "wrt of sinks": ({"wrt": ("q", "sinks")}, KeywordError, "there is no sinks"),
    "wrt of a prefix": ({"wrt": ("prefix_v",)}, KeywordError, "there is no prefix"),
}


def disagreed(size):
    """What the odd rank of so many does differently, and what the error says the ranks disagree on."""
    return {
        "causal": ({"causal": True}, "causal"),
        "window": ({"window": (3, 2)}, "window"),
        "open window": ({"window": (None, 2)}, "window"),
        "scale": ({"scale": 0.25}, "scale"),
        "softcap": ({"softcap": 3.0}, "softcap"),
        "layout": ({"layout": "striped"}, "layout of q"),
        "layout of one's own": ({"layout": ringcore.contiguous(LENGTH, size)}, "layout of q"),
        "layout of k": ({"k_layout": "striped"}, "layout of k and v"),
        "documents": ({"documents": [0] * (LENGTH - 1) + [1]}, "documents"),
        "cu_seqlens": ({"cu_seqlens": [0, 5, LENGTH]}, "documents"),
        "sinks": ({"sinks": np.zeros(4)}, "sinks"),
        "dropout": ({"dropout": 0.5, "dropout_seed": 1}, "dropout"),
        "alibi": ({"alibi": np.zeros(4)}, "alibi"),
        "prefix": ({"prefix": (np.zeros((2, 2, 3, 6)),) * 2}, "prefix"),
        "key lengths": ({"key_lengths": [3, 4]}, "key_lengths"),
        "query offset": ({"query_offset": 1}, "query_offset"),
        "query offsets": ({"query_offset": [0, 1]}, "query_offset"),
        "batch": (dict.fromkeys("qkv", cut(slice(1))), "batch"),
        "heads": ({"q": cut(EVERY, slice(2))}, "heads"),
        "key heads": (dict.fromkeys("kv", cut(EVERY, slice(1))), "key heads"),
        "width": (dict.fromkeys("qk", cut(..., slice(5))), "width of q and k"),
        "value width": ({"v": cut(..., slice(5))}, "width of v"),
        "dtype": (dict.fromkeys("qkv", lambda x: x.astype("float32")), "dtype"),
        "bias": ({"bias": np.zeros((1, LENGTH))}, "bias columns"),
        "mask": ({"mask": np.ones((1, LENGTH), bool)}, "mask columns"),
        "mask of positions": ({"mask": lambda _: lambda i, j: i >= j}, "mask of positions"),
    }
