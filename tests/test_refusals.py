"""Bad input: one clear error of the right kind, which says what came, what was due and what to do."""

import numpy as np
import pytest
from given import GIVEN, K, Q, V, refused, strict, torch

import ringcore
from ringcore import (
    DeviceError,
    DtypeError,
    KeywordError,
    LayoutError,
    ShapeError,
    UnsupportedError,
    ring_attention,
    ring_attention_vjp,
)

NAN, INF = float("nan"), float("inf")

# Each row: what differs from a right call, the error, and what its message must say.
SHAPES = {
    "q of three axes": ({"q": Q[0]}, ["q has 3 axes, shape (4, 6, 4)", "four, [B, H, S, D]"]),
    "k of five axes": ({"k": K[None]}, ["k has 5 axes, shape (1, 2, 2, 6, 4)", "four"]),
    "v of no axes": ({"v": np.array(1.0)}, ["v has 0 axes, shape ()", "four"]),
    "three axes, other order": ({"q": Q[0], "axes": "bshd"}, ["q has 3 axes", "four, [B, S, H, D]"]),
    "batch": ({"k": K[:1], "v": V[:1]}, ["batch", "q (2, 4, 6, 4), k (1, 2, 6, 4), v (1, 2, 6, 3)"]),
    "batch of v": ({"v": V[:1]}, ["batch", "v (1, 2, 6, 3)"]),
    "heads of v": ({"v": V[:, :1]}, ["k and v must share heads", "k (2, 2, 6, 4), v (2, 1, 6, 3)"]),
    "rows of v": ({"v": V[:, :, :4]}, ["k and v must share", "length", "v (2, 2, 4, 3)"]),
    "heads that do not divide": (
        {"q": Q[:, :3]},
        ["q has 3 heads", "2 heads of k and v do not divide", "whole number"],
    ),
    "more key heads": ({"q": Q[:, :1]}, ["q has 1 heads", "2 heads of k and v"]),
    "width of k": ({"k": K[..., :2]}, ["width D", "q (2, 4, 6, 4), k (2, 2, 6, 2)"]),
    "no width": ({"q": Q[..., :0], "k": K[..., :0]}, ["widths and heads must be at least 1", "q (2, 4, 6, 0)"]),
    "no value width": ({"v": V[..., :0]}, ["at least 1", "v (2, 2, 6, 0)"]),
    "no heads": ({"q": Q[:, :0]}, ["heads must be at least 1", "q (2, 0, 6, 4)"]),
    "no key heads": ({"k": K[:, :0], "v": V[:, :0]}, ["heads must be at least 1", "k (2, 0, 6, 4)"]),
    "no heads at all": ({"q": Q[:, :0], "k": K[:, :0], "v": V[:, :0]}, ["heads must be at least 1", "q (2, 0, 6, 4)"]),
    "bias of one axis": ({"bias": np.zeros(6)}, ["bias has 1 axes, shape (6,)", "two to four", "1 in the place of S"]),
    "bias of five axes": (
        {"bias": np.zeros((1, 1, 1, 6, 6))},
        ["bias has 5 axes, shape (1, 1, 1, 6, 6)", "two to four"],
    ),
    "rows of bias": (
        {"bias": np.zeros((5, 6))},
        ["bias has shape (5, 6)", "axis S must be 1 or q's 6", "global order"],
    ),
    "heads of bias": ({"bias": np.zeros((2, 6, 6))}, ["bias has shape (2, 6, 6)", "axis H must be 1 or q's 4"]),
    "batch of bias": ({"bias": np.zeros((3, 4, 6, 6))}, ["bias has shape (3, 4, 6, 6)", "axis B must be 1 or q's 2"]),
    "columns of bias": ({"bias": np.zeros((6, 5))}, ["bias has 5 columns", "there are 6 keys", "1 column or all"]),
    "rows of mask": ({"mask": np.ones((5, 6), bool)}, ["mask has shape (5, 6)", "axis S must be 1 or q's 6"]),
    "columns of mask": ({"mask": np.ones((6, 7), bool)}, ["mask has 7 columns", "there are 6 keys"]),
    "sinks of no axes": ({"sinks": np.float64(1)}, ["sinks has shape ()", "each of q's 4 heads, [H]"]),
    "sinks of key heads": ({"sinks": np.zeros(2)}, ["sinks has shape (2,)", "each of q's 4 heads, [H]"]),
    "sinks of two axes": ({"sinks": np.zeros((2, 4))}, ["sinks has shape (2, 4)", "[H]"]),
    "mask of no axes": ({"mask": np.True_}, ["mask has 0 axes", "two to four"]),
    "mask of positions of rows": (
        {"mask": lambda i, j: (i == i) & (j[:, :1] == j[:, :2])},
        ["mask, a function of positions, gave shape (2, 2)", "2 queries and 3 keys", "[B, H, s, t], (2, 4, 2, 3)"],
    ),
    "alibi of key heads": ({"alibi": np.zeros(2)}, ["alibi has shape (2,)", "one slope for each of q's 4 heads, [H]"]),
    "prefix of three axes": ({"prefix": (K[0], V)}, ["prefix_k has 3 axes", "[B, H, S, D]"]),
    "prefix of query heads": (
        {"prefix": (np.zeros((2, 4, 3, 4)), np.zeros((2, 4, 3, 3)))},
        ["the k of prefix has shape (2, 4, 3, 4)", "it must be (2, 2, 3, 4)"],
    ),
    "prefix of two lengths": (
        {"prefix": (K[:, :, :3], V[:, :, :2])},
        ["the v of prefix has shape (2, 2, 2, 3)", "a prefix of 3 keys", "(2, 2, 3, 3)"],
    ),
}
DTYPES = {
    "integers": ({"q": Q.astype(int), "k": K.astype(int), "v": V.astype(int)}, ["q holds int64", "float16", "Convert"]),
    "bool": ({"q": Q > 0}, ["q holds bool", "bfloat16"]),
    "complex": ({"k": K + 0j}, ["k holds complex128", "float32"]),
    "objects": ({"v": V.astype(object)}, ["v holds object", "float64"]),
    "long double": ({"q": Q.astype(np.longdouble)}, ["q holds", "float64"]),
    "mixed": ({"k": K.astype("float32")}, ["share one dtype", "q: float64, k: float32, v: float64"]),
    "mixed halves": (
        {"q": Q.astype("float16"), "k": K.astype("float32"), "v": V.astype("float32")},
        ["share one dtype", "q: float16, k: float32, v: float32"],
    ),
    "list": ({"q": Q.tolist()}, ["q is a list", "an array of NumPy"]),
    "nothing": ({"k": None}, ["k is a NoneType", "an array of NumPy"]),
    "text": ({"v": "v"}, ["v is a str", "an array"]),
    "bias list": ({"bias": [[0.0]]}, ["bias is a list", "an array"]),
    "bias number": ({"bias": 0.5}, ["bias is a float", "an array"]),
    "bias integers": ({"bias": np.zeros((6, 6), int)}, ["bias holds int64", "added to the scores", "float32"]),
    "bias bool": ({"bias": np.ones((6, 6), bool)}, ["bias holds bool", "added to the scores"]),
    "alibi integers": ({"alibi": np.zeros(4, int)}, ["alibi holds int64", "a slope for each head"]),
    "prefix lists": ({"prefix": (K.tolist(), V.tolist())}, ["prefix_k is a list", "an array"]),
    "prefix of another dtype": (
        {"prefix": (K.astype("float32"), V)},
        ["share one dtype", "prefix_k: float32", "prefix_v: float64"],
    ),
    "sinks list": ({"sinks": [0.0] * 4}, ["sinks is a list", "an array"]),
    "sinks integers": ({"sinks": np.zeros(4, int)}, ["sinks holds int64", "a score for each head", "float32"]),
    "mask list": ({"mask": [[True]]}, ["mask is a list", "an array"]),
    "mask of positions of numbers": (
        {"mask": lambda i, j: i - j},
        ["mask, a function of positions, gave int64", "it must give bool"],
    ),
    "mask of positions of no array": (
        {"mask": lambda i, j: True},
        ["mask, a function of positions, gave a bool", "an array of the library of its positions"],
    ),
    "mask integers": (
        {"mask": np.ones((6, 6), int)},
        ["mask holds int64", "must be bool, True = may attend", "use bias"],
    ),
    "mask numbers": ({"mask": np.zeros((6, 6))}, ["mask holds float64", "must be bool", "use bias"]),
}
KEYWORDS = {
    "dropout of all": ({"dropout": 1.0, "dropout_seed": 1}, ["dropout is 1.0", "less than 1"]),
    "negative dropout": ({"dropout": -0.1, "dropout_seed": 1}, ["dropout is -0.1", "from 0 on"]),
    "dropout NaN": ({"dropout": float("nan"), "dropout_seed": 1}, ["dropout is nan"]),
    "dropout flag": ({"dropout": True, "dropout_seed": 1}, ["dropout is True"]),
    "dropout without a seed": ({"dropout": 0.5}, ["there is no dropout_seed", "the same on every rank"]),
    "seed of a fraction": ({"dropout": 0.5, "dropout_seed": 0.5}, ["dropout_seed is 0.5", "64 bits"]),
    "negative seed": ({"dropout_seed": -1}, ["dropout_seed is -1", "0 or more"]),
    "negative left": ({"window": (-1, 2)}, ["window is (-1, 2)", "None (unbounded) or an integer from 0"]),
    "negative right": ({"window": (1, -2)}, ["window is (1, -2)", "from 0 (itself only) on"]),
    "window triple": ({"window": (1, 2, 3)}, ["window is (1, 2, 3)", "(left, right)"]),
    "window single": ({"window": (1,)}, ["window is (1,)", "(left, right)"]),
    "window text": ({"window": "ab"}, ["window is 'ab'", "(left, right)"]),
    "window float": ({"window": (1.0, 2)}, ["window is (1.0, 2)", "integer"]),
    "window bool": ({"window": (True, 2)}, ["window is (True, 2)", "integer"]),
    "window array": ({"window": np.array([1, 2])}, ["window is array([1, 2])", "(left, right)"]),
    "window number without causal": ({"window": 3}, ["single number 3", "causal=True only", "Give (left, right)"]),
    "window 0": ({"window": 0, "causal": True}, ["window is 0", "sees at least itself", "1 or more"]),
    "window -1": ({"window": -1, "causal": True}, ["window is -1", "1 or more"]),
    "window 1.5": ({"window": 1.5, "causal": True}, ["window is 1.5", "with causal=True a number"]),
    "causal text": ({"causal": "no"}, ["causal is 'no'", "True or False"]),
    "causal number": ({"causal": 1}, ["causal is 1", "True or False"]),
    "causal nothing": ({"causal": None}, ["causal is None", "True or False"]),
    "scale NaN": ({"scale": NAN}, ["scale is nan", "finite in float64"]),
    "scale inf": ({"scale": -INF}, ["scale is -inf", "finite"]),
    "scale complex": ({"scale": 1j}, ["scale is 1j", "a real number"]),
    "scale complex scalar": ({"scale": np.complex128(1 + 2j)}, ["scale is", "1+2j", "a real number"]),
    "scale text": ({"scale": "0.5"}, ["scale is '0.5'", "a real number"]),
    "scale bool": ({"scale": True}, ["scale is True", "a real number"]),
    "scale array": ({"scale": np.array([0.5])}, ["scale is array([0.5])", "a real number"]),
    "scale too large": ({"scale": 10**400}, ["scale is inf", "finite"]),
    "softcap 0": ({"softcap": 0.0}, ["softcap is 0.0", "larger than 0", "None for no cap"]),
    "softcap negative": ({"softcap": -2}, ["softcap is -2", "larger than 0"]),
    "softcap NaN": ({"softcap": NAN}, ["softcap is nan", "finite"]),
    "softcap inf": ({"softcap": INF}, ["softcap is inf", "finite"]),
    "softcap text": ({"softcap": "5"}, ["softcap is '5'", "a real number"]),
    "softcap bool": ({"softcap": True}, ["softcap is True", "a real number"]),
    "ring size 0": ({"ring_size": 0}, ["ring_size is 0", "1 or more"]),
    "ring size -1": ({"ring_size": -1}, ["ring_size is -1", "1 or more"]),
    "ring size bool": ({"ring_size": True}, ["ring_size is True", "whole number of ranks"]),
    "ring size float": ({"ring_size": 2.0}, ["ring_size is 2.0", "whole number of ranks"]),
    "ring size text": ({"ring_size": "2"}, ["ring_size is '2'", "whole number of ranks"]),
    "ring number": ({"ring": 3}, ["ring is a builtins.int", "a transport or a communicator"]),
    "ring text": ({"ring": "mpi"}, ["ring is a builtins.str", "a transport or a communicator"]),
    "ring object": ({"ring": object()}, ["ring is a builtins.object", "a transport or a communicator"]),
    "key lengths one number": ({"key_lengths": 5}, ["key_lengths is the number 5", "each of the 2 batch entries"]),
    "key lengths too few": ({"key_lengths": [5]}, ["key_lengths has 1 entries", "each of the 2 batch entries"]),
    "key lengths too many": ({"key_lengths": [5, 5, 5]}, ["key_lengths has 3 entries", "each of the 2 batch entries"]),
    "key lengths negative": ({"key_lengths": [-1, 5]}, ["key_lengths is [-1, 5]", "0 or more"]),
    "key lengths too large": ({"key_lengths": [6, 7]}, ["key_lengths is 7 for batch entry 1", "only 6 keys"]),
    "key lengths float": ({"key_lengths": [5.0, 5.0]}, ["key_lengths is [5.0, 5.0]", "hold one integer for each"]),
    "key lengths bool": ({"key_lengths": [True, True]}, ["key_lengths is [True, True]", "hold one integer for each"]),
    "key lengths nested": ({"key_lengths": [[5], [5]]}, ["key_lengths is [[5], [5]]", "hold one integer for each"]),
    "key lengths a set": ({"key_lengths": {4, 5}}, ["key_lengths is {4, 5}", "hold one integer for each"]),
    "key lengths a mapping": ({"key_lengths": {1: 4, 2: 5}}, ["key_lengths is {1: 4, 2: 5}", "one integer for each"]),
    "key lengths array": ({"key_lengths": np.ones((2, 1), int)}, ["key_lengths is array(", "one integer for each"]),
    "offset too few": (
        {"query_offset": [1]},
        ["query_offset has 1 entries", "an integer, or hold one for each of the 2"],
    ),
    "offset too many": ({"query_offset": [1, 2, 3]}, ["query_offset has 3 entries", "each of the 2 batch entries"]),
    "offset float": ({"query_offset": 1.5}, ["query_offset is 1.5", "must be an integer"]),
    "offsets float": ({"query_offset": [1.0, 2.0]}, ["query_offset is [1.0, 2.0]", "must be an integer"]),
    "offset bool": ({"query_offset": True}, ["query_offset is True", "must be an integer"]),
    "offset nothing": ({"query_offset": None}, ["query_offset is None", "must be an integer"]),
    "documents too few": ({"documents": [0, 0, 1]}, ["documents end at position 3", "there are 6 keys"]),
    "documents too many": ({"documents": np.arange(7)}, ["documents end at position 7", "there are 6 keys"]),
    "documents of three entries": (
        {"documents": np.zeros((3, 6), int)},
        ["documents has 3 rows", "all 2 batch entries"],
    ),
    "documents of different lengths": ({"documents": [[0] * 6, [0] * 5]}, ["documents has rows of 6, 5 ids"]),
    "documents of three axes": ({"documents": np.zeros((1, 1, 6), int)}, ["documents has 3 axes", "key"]),
    "documents a number": ({"documents": 3}, ["documents is 3", "one integer for each key"]),
    "documents a scalar array": ({"documents": np.array(3)}, ["documents has 0 axes"]),
    "documents text": ({"documents": "aabbcc"}, ["documents is 'aabbcc'", "one integer for each key"]),
    "documents float": ({"documents": np.zeros(6)}, ["documents is [0.0", "one integer for each key"]),
    "documents bool": ({"documents": [True] * 6}, ["documents is [True", "one integer for each key"]),
    "documents nested": ({"documents": [[[0] * 6]]}, ["documents is [[0, 0", "one integer for each key"]),
    "queries before documents": (
        {"documents": [0] * 6, "query_offset": -1},
        ["queries of batch entry 0 are at the positions -1 to 4", "documents are known for 0 to 5", "query_offset"],
    ),
    "queries behind documents": (
        {"documents": [0] * 6, "query_offset": [0, 2]},
        ["queries of batch entry 1 are at the positions 2 to 7", "known for 0 to 5"],
    ),
    "documents twice": ({"documents": [0] * 6, "cu_seqlens": [0, 6]}, ["documents and cu_seqlens came together"]),
    "cu_seqlens that begin late": ({"cu_seqlens": [2, 6]}, ["cu_seqlens is [2, 6]", "must begin with 0"]),
    "cu_seqlens of nothing": ({"cu_seqlens": []}, ["cu_seqlens is []", "must begin with 0"]),
    "cu_seqlens that fall": ({"cu_seqlens": [0, 4, 3, 6]}, ["from 4 to 3", "document 1 ends before it begins"]),
    "cu_seqlens of an empty document": ({"cu_seqlens": [0, 4, 4, 6]}, ["from 4 to 4", "document 1 is empty"]),
    "cu_seqlens that end early": ({"cu_seqlens": [0, 4]}, ["documents end at position 4", "there are 6 keys"]),
    "cu_seqlens that overrun": ({"cu_seqlens": [0, 4, 8]}, ["documents end at position 8", "there are 6 keys"]),
    "cu_seqlens float": ({"cu_seqlens": [0.0, 6.0]}, ["cu_seqlens is [0.0, 6.0]", "integers at which documents begin"]),
    "cu_seqlens a number": ({"cu_seqlens": 6}, ["cu_seqlens is 6", "integers at which documents begin"]),
    "axes unknown": ({"axes": "bhds"}, ["axes is 'bhds'", '"bhsd"', '"bshd"']),
    "axes nothing": ({"axes": None}, ["axes is None", '"bhsd"']),
    "kernels unknown": ({"kernels": "fast"}, ["kernels is 'fast'", "the installed ones are reference, ", "numpy"]),
    "kernels a number": ({"kernels": 3}, ["kernels is 3", "a name or have capabilities, forward and backward"]),
    "kernels a class": ({"kernels": ringcore.Kernels}, ["kernels is <class", "a name or have capabilities"]),
}
LAYOUTS = {
    "unknown": ({"layout": "spiral"}, ["layout is 'spiral'", "contiguous, zigzag, striped"]),
    "other case": ({"layout": "Zigzag"}, ["layout is 'Zigzag'", "ringcore.Layout or one of"]),
    "nothing": ({"layout": None}, ["layout is None", "ringcore.Layout or one of"]),
    "number": ({"layout": 2}, ["layout is 2", "ringcore.Layout or one of"]),
    "of q unknown": ({"q_layout": "spiral"}, ["q_layout is 'spiral'", "contiguous, zigzag, striped"]),
    "of k a number": ({"k_layout": 2}, ["k_layout is 2", "ringcore.Layout or one of"]),
    "another length": (
        {"layout": ringcore.zigzag(5, 2), "ring_size": 2},
        ["zigzag layout deals 5 positions to 2 ranks", "q has 6 positions and the ring 2 ranks", "Build the layout"],
    ),
    "another size": (
        {"layout": ringcore.striped(6, 3), "ring_size": 2},
        ["striped layout deals 6 positions to 3 ranks", "the ring 2 ranks", "Build the layout"],
    ),
    "another length of k": (
        {"layout": ringcore.striped(6, 2), "ring_size": 2, "k": K[:, :, :4], "v": V[:, :, :4]},
        ["deals 6 positions", "k has 4 positions"],
    ),
}
ROWS = [
    pytest.param(changes, error, said, id=f"{error.__name__}-{name.replace(' ', '_')}")
    for error, table in ((ShapeError, SHAPES), (DtypeError, DTYPES), (KeywordError, KEYWORDS), (LayoutError, LAYOUTS))
    for name, (changes, said) in table.items()
]


@pytest.mark.parametrize("attend", [ring_attention, ring_attention_vjp])
@pytest.mark.parametrize(("changes", "error", "said"), ROWS)
def test_bad_input_is_refused_with_what_came_and_what_was_due(attend, changes, error, said):
    refused(lambda: attend(**{"q": Q, "k": K, "v": V, **changes}), error, said)


def test_ring_and_ring_size_together_are_refused():
    class Ring:
        rank, size, node, sharers = 0, 1, 0, 1

        def check(self, *arrays):
            pass

        def gather(self, note):
            return (note,)

        exchange = abort = check

    said = ["ring and ring_size=2 came together", "Give one"]
    refused(lambda: ring_attention(Q, K, V, ring=Ring(), ring_size=2), KeywordError, said)


def test_auto_is_a_layout_of_whole_arrays_alone():
    for keywords in ({"q_layout": "auto"}, {"layout": "auto", "k_layout": "zigzag"}):
        refused(lambda given=keywords: ring_attention(Q, K, V, ring_size=2, **given), LayoutError, ["'auto'"])
    refused(lambda: ringcore.shard(Q, "auto", 0, 2), LayoutError, ["'auto'"])


@pytest.mark.parametrize("prefix", [K, (K,), (K, V, V), (None, V), (K, None), 3])
def test_a_prefix_that_is_no_pair_is_refused(prefix):
    for function in (ring_attention, ring_attention_vjp, ringcore.explain):
        refused(lambda call=function: call(Q, K, V, prefix=prefix), KeywordError, ["prefix must hold two", "(k, v)"])


def test_gradients_that_are_not_made_are_not_reduced():
    said = ["reduce_replicated is about gradients", "ring_attention_vjp"]
    refused(lambda: ring_attention(Q, K, V, reduce_replicated=True), KeywordError, said)


@pytest.mark.parametrize("value", ["yes", 1, None, np.ones(2, bool)])
def test_return_lse_other_than_true_or_false_is_refused(value):
    refused(lambda: ring_attention(Q, K, V, return_lse=value), KeywordError, ["return_lse is", "True or False"])


@pytest.mark.parametrize(
    ("wrt", "said"),
    [
        (("x",), ["wrt is ('x',)", "q, k, v, bias"]),
        (("q", "q"), ["wrt is ('q', 'q')", "each once"]),
        ((), ["wrt is ()", "some of"]),
        ("q", ["wrt is 'q'", "in a tuple"]),
        (None, ["wrt is None", "in a tuple"]),
        (3, ["wrt is 3", "in a tuple"]),
        ({"q", "k"}, ["wrt is {", "in a tuple"]),  # it has no order
        ([["q"]], ["wrt is [['q']]", "in a tuple"]),
        (iter("q"), ["wrt is <", "in a tuple"]),
        (("q", "bias"), ['wrt holds "bias"', "there is no bias", "Give bias="]),
        (("sinks",), ['wrt holds "sinks"', "there is no sinks", "Give sinks="]),
        (("prefix_k",), ['wrt holds "prefix_k"', "there is no prefix", "Give prefix="]),
    ],
)
def test_wrt_that_names_no_gradients_is_refused(wrt, said):
    refused(lambda: ring_attention_vjp(Q, K, V, wrt=wrt), KeywordError, said)


def test_wrt_is_read_when_the_call_is_made():
    wrt = ["v", "q"]
    (out, _), pullback = ring_attention_vjp(Q, K, V, wrt=wrt)
    wrt.append("k")
    assert [x.shape for x in pullback(out)] == [V.shape, Q.shape]


FUTURE = [
    "agreement",
    "attn_mask",
    "block_mask",
    "is_causal",
    "segment_lengths",
]


@pytest.mark.parametrize("attend", [ring_attention, ring_attention_vjp])
@pytest.mark.parametrize("name", FUTURE)
def test_keywords_without_an_implementation_are_not_in_the_signature(attend, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        attend(Q, K, V, **{name: None})


def test_keywords_come_by_name():
    with pytest.raises(TypeError, match="positional"):
        ring_attention(Q, K, V, True)


class Weak:
    """Kernels that can do next to nothing."""

    def __init__(self, **can):
        nothing = dict.fromkeys(("bias", "mask", "softcap", "gradient"), False)
        self.capabilities = ringcore.Capabilities("weak", **{**nothing, **can})

    def forward(self, *arrays, **keywords):
        raise AssertionError("they were asked")

    backward = forward


@pytest.mark.parametrize(
    ("attend", "can", "keywords", "said"),
    [
        (ring_attention, {}, {"bias": np.zeros((6, 6))}, "they have no bias"),
        (ring_attention, {}, {"mask": np.ones((6, 6), bool)}, "they have no mask"),
        (ring_attention, {}, {"softcap": 1.0}, "they have no softcap"),
        (ring_attention_vjp, {}, {}, "they have no gradient"),
        (ring_attention, {"dtypes": frozenset({"float16"})}, {}, "they take float16, not float64"),
        (ring_attention, {"largest_head": 3}, {}, "their widest head is 3, but this call has 4"),
        (ring_attention, {"libraries": frozenset({"cupy"})}, {}, "they take arrays of cupy, not of numpy"),
        (ring_attention, {"devices": frozenset({"cuda"})}, {}, "they compute on cuda, not on cpu"),
    ],
)
def test_kernels_that_cannot_do_the_call_are_refused_by_name(attend, can, keywords, said):
    kernels = Weak(**can)
    refused(lambda: attend(Q, K, V, kernels=kernels, **keywords), UnsupportedError, ["the kernels 'weak'", said])


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "dout"])
def test_masked_arrays_are_refused_as_their_mask_would_be_ignored(name):
    given = {**GIVEN, "bias": np.zeros((6, 6)), "mask": np.ones((6, 6), bool)}
    given[name] = np.ma.array(given[name])

    def call():
        _, pullback = ring_attention_vjp(**{name: given[name] for name in ("q", "k", "v", "bias", "mask")})
        pullback(given["dout"])

    refused(call, UnsupportedError, [f"{name} is a masked array", f"{name}.data"])


@pytest.mark.parametrize("name", ["k", "v", "bias", "mask"])
@pytest.mark.parametrize("other", [torch, strict])
def test_mixed_libraries_are_refused_with_their_names(name, other):
    given = {"q": Q, "k": K, "v": V, "bias": np.zeros((6, 6)), "mask": np.ones((6, 6), bool)}
    given[name] = other().asarray(given[name])
    said = [f"{name}: {other().__name__}", "q: numpy", "different libraries", "from_dlpack"]
    refused(lambda: ring_attention(**given), DeviceError, said)


@pytest.mark.parametrize("name", ["k", "v", "bias", "mask"])
def test_different_devices_are_refused_with_their_names(name):
    xp = strict()
    given = {"q": Q, "k": K, "v": V, "bias": np.zeros((6, 6)), "mask": np.ones((6, 6), bool)}
    devices = {each: xp.Device("device1" if each == name else "CPU_DEVICE") for each in given}
    given = {each: xp.asarray(x, device=devices[each]) for each, x in given.items()}
    said = [
        "different devices",
        "q: array_api_strict.Device('CPU_DEVICE')",
        f"{name}: array_api_strict.Device('device1')",
    ]
    refused(lambda: ring_attention(**given), DeviceError, said)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "dout", "dlse"])
def test_tensors_that_require_grad_are_refused_by_name(name):
    given = {each: torch().asarray(x) for each, x in {**GIVEN, "bias": np.zeros((6, 6))}.items()}
    given[name] = given[name].clone().requires_grad_()

    def call():
        _, pullback = ring_attention_vjp(**{each: given[each] for each in ("q", "k", "v", "bias")})
        pullback(given["dout"], given["dlse"])

    refused(call, UnsupportedError, [f"{name} requires grad", "detached", "ringcore.ring_attention"])


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_numbers_that_require_grad_are_refused_by_name(name):
    number = torch().tensor(0.5, requires_grad=True)
    refused(lambda: ring_attention(Q, K, V, **{name: number}), UnsupportedError, [f"{name} requires grad"])


def test_sparse_tensors_are_refused():
    q, k, v = (torch().asarray(x) for x in (Q, K, V))
    refused(lambda: ring_attention(q, k.to_sparse(), v), UnsupportedError, ["k is a tensor", "sparse", "dense"])


GRADIENTS = {
    "nothing": ("dout", lambda x: None, DtypeError, ["dout is a NoneType"]),
    "list": ("dout", lambda x: x.tolist(), DtypeError, ["dout is a list", "an array"]),
    "dtype": ("dout", lambda x: x.astype("float32"), DtypeError, ["dout holds float32", "out's float64"]),
    "integers": ("dout", lambda x: x.astype(int), DtypeError, ["dout holds int64", "out's float64"]),
    "batch": ("dout", lambda x: x[:1], ShapeError, ["dout has shape (1, 4, 6, 3)", "that of out, (2, 4, 6, 3)"]),
    "axes": ("dout", lambda x: x[0], ShapeError, ["dout has shape (4, 6, 3)", "(2, 4, 6, 3)"]),
    "order of axes": ("dout", lambda x: x.swapaxes(1, 2), ShapeError, ["dout has shape (2, 6, 4, 3)", "(2, 4, 6, 3)"]),
    "library": ("dout", lambda x: torch().asarray(x), DeviceError, ["dout is an array of torch", "q one of numpy"]),
    "lse list": ("dlse", lambda x: x.tolist(), DtypeError, ["dlse is a list", "an array"]),
    "lse dtype": ("dlse", lambda x: x.astype("float32"), DtypeError, ["dlse holds float32", "lse's float64"]),
    "lse axes": ("dlse", lambda x: x[..., None], ShapeError, ["dlse has shape (2, 4, 6, 1)", "that of lse, (2, 4, 6)"]),
    "lse library": ("dlse", lambda x: strict().asarray(x), DeviceError, ["dlse is an array of array_api_strict"]),
}


@pytest.mark.parametrize(("name", "change", "error", "said"), GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_unlike_their_results_are_refused_and_right_ones_still_work(name, change, error, said):
    _, pullback = ring_attention_vjp(Q, K, V, ring_size=2)
    given = {each: GIVEN[each] for each in ("dout", "dlse")}
    due = pullback(**given)
    refused(lambda: pullback(**{**given, name: change(given[name])}), error, said)
    for first, second in zip(due, pullback(**given), strict=True):
        np.testing.assert_array_equal(first, second)


def test_gradient_on_another_device_is_refused():
    xp = strict()
    _, pullback = ring_attention_vjp(*(xp.asarray(x) for x in (Q, K, V)))
    dout = xp.asarray(GIVEN["dout"], device=xp.Device("device1"))
    refused(
        lambda: pullback(dout), DeviceError, ["dout is on the device array_api_strict.Device('device1')", "CPU_DEVICE"]
    )


@pytest.mark.parametrize("kernels", ["numpy", "reference"])
@pytest.mark.parametrize("size", [1, 3])
def test_pullback_may_be_called_again_with_another_gradient(kernels, size):
    rng = np.random.default_rng(3)
    _, pullback = ring_attention_vjp(Q, K, V, ring_size=size, kernels=kernels, causal=True)
    dout, other = GIVEN["dout"], rng.standard_normal(GIVEN["dout"].shape)
    first, second, both = pullback(dout), pullback(other), pullback(dout + other)
    for one, two, sum_ in zip(first, second, both, strict=True):
        np.testing.assert_allclose(one + two, sum_, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [1e39, -1e39])
def test_scale_is_finite_in_the_dtype_of_the_scores(value):
    refused(
        lambda: ring_attention(*(x.astype("float32") for x in (Q, K, V)), scale=value),
        KeywordError,
        [f"scale is {value}", "finite in float32"],
    )


def test_softcap_that_rounds_to_nothing_is_refused():
    said = ["softcap is 1e-50", "at least 1.2e-38 for float32 arrays"]
    refused(lambda: ring_attention(*(x.astype("float32") for x in (Q, K, V)), softcap=1e-50), KeywordError, said)
    assert np.isfinite(ring_attention(Q, K, V, softcap=1e-50)).all()
