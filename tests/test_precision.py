"""How exact results are, whatever the ring: bounds, growth with the ring, half types, poison and zeros."""

from functools import cache

import by_rows
import numpy as np
import pytest

import ringcore
from ringcore import ring_attention, ring_attention_vjp

ml_dtypes = pytest.importorskip("ml_dtypes")

NAMES = ("out", "lse", "dq", "dk", "dv")
KERNELS = ("numpy", "reference")
LAYOUTS = ("contiguous", "zigzag", "striped", "own")
LENGTH = 33


def draw(seed, dtype, batch=2, heads=4, key_heads=2, queries=LENGTH, keys=LENGTH, width=8, value_width=5):
    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    shapes = [
        (batch, heads, queries, width),
        (batch, key_heads, keys, width),
        (batch, key_heads, keys, value_width),
        (batch, heads, queries, value_width),
    ]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def run(q, k, v, dout, dlse=None, **keywords):
    """(out, lse, dq, dk, dv)."""
    (out, lse), pullback = ring_attention_vjp(q, k, v, **keywords)
    return out, lse, *pullback(dout, dlse)


def layout_of(name, length, size):
    """A named layout, or one of our own: the ranks' parts are uneven, interleaved and out of order."""
    if name != "own":
        return name
    cut = length // 3
    parts = [range(cut, length, 2), range(0, cut), range(cut + 1, length, 2)]
    return ringcore.Layout(tuple(tuple(parts[rank::size]) for rank in range(size)))


def full(term):
    return np.broadcast_to(term, (2, 4, LENGTH, LENGTH))


def finfo_bias(rng, dtype):
    """The mask of many model libraries: the most negative number, and some rows of nothing else."""
    bias = np.where(rng.random((2, 4, LENGTH, LENGTH)) < 0.4, np.finfo(dtype).min, 0).astype(dtype)
    bias[:, :, ::5] = np.finfo(dtype).min
    return bias


def hiding_bias(rng, dtype):
    bias = rng.standard_normal((2, 4, LENGTH, LENGTH)).astype(dtype)
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    bias[:, :, 7] = -np.inf
    return bias


LARGE = 2000.0  # times q.k of width 8: logits beyond 1e4, far from each other
CLOSE = {"scale": 1.0}  # here q and k get a number in common, for logits beyond 1e4 that differ by little
BOUNDED = {
    "plain": lambda rng, dtype: {},
    "causal": lambda rng, dtype: {"causal": True},
    "window": lambda rng, dtype: {"window": (7, 2), "query_offset": 3},
    "finfo.min bias": lambda rng, dtype: {"bias": finfo_bias(rng, dtype)},
    "causal finfo.min bias": lambda rng, dtype: {"bias": finfo_bias(rng, dtype), "causal": True},
    "finfo.min bias, large logits": lambda rng, dtype: {"bias": finfo_bias(rng, dtype), "scale": LARGE},
    "bias of -inf": lambda rng, dtype: {"bias": hiding_bias(rng, dtype)},
    "mask": lambda rng, dtype: {"mask": rng.random((2, 4, LENGTH, LENGTH)) < 0.3},
    "large logits": lambda rng, dtype: {"scale": LARGE},
    "causal large logits": lambda rng, dtype: {"scale": LARGE, "causal": True},
    "close large logits": lambda rng, dtype: CLOSE,
    "causal close large logits": lambda rng, dtype: {**CLOSE, "causal": True},
    "close large logits, finfo.min bias": lambda rng, dtype: {**CLOSE, "bias": finfo_bias(rng, dtype)},
    "large logits, masked": lambda rng, dtype: {"scale": LARGE, "mask": rng.random((2, 4, LENGTH, LENGTH)) < 0.5},
}


@cache
def bounded(name, dtype):
    """Arrays, keywords and the truth of a row of the table, which no ring and no kernel may change."""
    arrays = draw(1, dtype)
    keywords = BOUNDED[name](np.random.default_rng(2), dtype)
    if keywords.get("scale") == CLOSE["scale"]:
        for x in arrays[:2]:
            x[..., 0] = 120
    dlse = np.random.default_rng(3).standard_normal(arrays[0].shape[:3]).astype(dtype)
    visible = {"scale": arrays[0].shape[3] ** -0.5, **keywords}
    visible["offset"] = visible.pop("query_offset", 0)
    return (*arrays, dlse), keywords, by_rows.attend(*arrays, dlse, **visible)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BOUNDED)
def test_errors_stay_within_their_bounds_on_any_ring(name, dtype, size, kernels):
    arrays, keywords, truth = bounded(name, dtype)
    layout = ("zigzag", "striped", "contiguous")[size % 3]
    came = run(*arrays, **keywords, ring_size=size, layout=layout, kernels=kernels)
    # A logit is rounded by 2^-24 or 2^-53 of its size, and its weight by as much.
    allowed = max(1e-12, truth.logit * 2**-52) if dtype == "float64" else 2e-6 * max(1.0, truth.logit / 16)
    assert (np.abs(came[0] - truth.out) <= allowed * np.maximum(truth.largest, 1e-300)[..., None]).all()
    seen = truth.lse != -np.inf
    assert (came[1][~seen] == -np.inf).all()
    due = truth.lse[seen]
    assert (np.abs(came[1][seen] - due) <= allowed * np.maximum(1, np.abs(due))).all()
    # A gradient sums weights times numbers of some size; its own bound in float32 is five times that of out.
    gradient = 1e-10 if dtype == "float64" else 5 * allowed
    for each, x in zip(NAMES[2:], came[2:], strict=True):
        due = getattr(truth, each)
        assert np.abs(x - due).max() <= gradient * max(1.0, np.abs(due).max()), each


SEEDS = 5  # draws, as entries of one batch: a ring of 64 in one process takes its time tile by tile


def errors(dtype, size, kernels):
    """The medians over the draws of the errors of out, dq, dk and dv, relative to their root mean square."""
    arrays, due = growing(dtype)
    out, _, *gradients = run(*arrays, causal=True, ring_size=size, kernels=kernels)

    def mean(x):
        return np.mean(x**2, axis=(1, 2, 3))

    return [
        np.median(np.sqrt(mean(x.astype(float) - y) / mean(y))) for x, y in zip((out, *gradients), due, strict=True)
    ]


@cache
def growing(dtype):
    """Arrays, and causal attention of them in one float64 matrix: out, dq, dk, dv."""
    arrays = draw(4, dtype, SEEDS, 1, 1, 512, 512, 64, 64)
    q, k, v, dout = (x.astype(float) for x in arrays)
    weights = np.exp(q @ k.swapaxes(2, 3) / 8) * np.tri(512)
    weights /= weights.sum(-1, keepdims=True)
    slopes = dout @ v.swapaxes(2, 3)
    slopes = weights * (slopes - (slopes * weights).sum(-1, keepdims=True)) / 8
    return arrays, (weights @ v, slopes @ k, slopes.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dout)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_error_does_not_grow_with_the_ring(dtype, kernels):
    alone, ring = errors(dtype, 1, kernels), errors(dtype, 64, kernels)
    for name, first, last in zip(("out", "dq", "dk", "dv"), alone, ring, strict=True):
        print(f"\n{kernels} {dtype} {name}: {first:.3g} at ring 1, {last:.3g} at ring 64", end="")
        assert last <= 1.2 * first, name


def steps(x):
    """The numbers of a half type counted from the lowest: neighbours are 1 apart, and +0 is -0."""
    bits = np.asarray(x).view(np.int16).astype(np.int64)
    return np.where(bits < 0, -32768 - bits, bits)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"window": (6, 3), "softcap": 3.0}], ids=str)
def test_half_types_are_rounded_once_at_the_end(keywords, dtype, size, kernels):
    """Results are those of float32 for the same numbers, but for the last rounding."""
    arrays = draw(5, dtype)
    dlse = np.random.default_rng(6).standard_normal(arrays[0].shape[:3]).astype("float32")
    came = run(*arrays, dlse, **keywords, ring_size=size, kernels=kernels)
    due = run(*(x.astype("float32") for x in arrays), dlse, **keywords, ring_size=size, kernels=kernels)
    assert came[1].dtype == np.float32
    np.testing.assert_array_equal(came[1], due[1])
    for name, x, wide in zip(("out", "dq", "dk", "dv"), (came[0], *came[2:]), (due[0], *due[2:]), strict=True):
        assert x.dtype == arrays[0].dtype, name
        assert np.abs(steps(x) - steps(wide.astype(x.dtype))).max() <= 1, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_of_torch_are_rounded_once_at_the_end(dtype):
    """By the reference kernels; tests/torch_adapter has the fused ones, which round each tile."""
    torch = pytest.importorskip("torch")
    arrays = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in draw(5, "float32")]
    came = run(*arrays, causal=True, ring_size=4, kernels="reference")
    due = run(*(x.to(torch.float32) for x in arrays), causal=True, ring_size=4, kernels="reference")
    assert came[1].dtype == torch.float32
    for name, x, wide in zip(NAMES, came, due, strict=True):
        assert x.dtype == (torch.float32 if name == "lse" else getattr(torch, dtype)), name
        assert torch.equal(x, wide.to(x.dtype)), name


def columns(*hidden):
    seen = np.ones((1, 1, 1, LENGTH), bool)
    seen[..., list(hidden)] = False
    return seen


# Which keywords hide which keys from every query.
HIDDEN = {
    "causal future": ({"causal": True, "query_offset": -4}, range(LENGTH - 4, LENGTH)),
    "causal future of the shorter q": ({"causal": True, "queries": 20}, range(20, LENGTH)),
    "outside the window": ({"window": (3, 1), "query_offset": 12}, [*range(9)]),
    "beyond the window": ({"window": (None, 0), "query_offset": -6}, range(LENGTH - 6, LENGTH)),
    "beyond the key lengths": ({"key_lengths": [24, 24]}, range(24, LENGTH)),
    "masked": ({"mask": columns(0, 7, 8, 32)}, [0, 7, 8, 32]),
    "bias of -inf": ({"bias": np.where(columns(3, 20, 21), 0.25, -np.inf)}, [3, 20, 21]),
    "causal and masked": ({"causal": True, "mask": columns(5, 6)}, [5, 6]),
}
RINGS = [(1, "contiguous"), *((4, layout) for layout in LAYOUTS)]
POISONS = [np.nan, np.inf, -np.inf]
poison_warns = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # as arithmetic with NaN may


@poison_warns
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("size", "layout"), RINGS)
@pytest.mark.parametrize("name", HIDDEN)
def test_poison_in_keys_that_no_query_sees_reaches_nothing(name, size, layout, kernels):
    keywords, hidden = HIDDEN[name]
    keywords = dict(keywords)
    queries = keywords.pop("queries", LENGTH)
    layout = layout_of(layout, LENGTH, size) if queries == LENGTH else layout if layout != "own" else "zigzag"
    q, k, v, dout = draw(8, "float64", queries=queries)
    keywords |= {"ring_size": size, "layout": layout, "kernels": kernels}
    due = run(q, k, v, dout, **keywords)
    for poison in POISONS:
        bad = [x.copy() for x in (k, v)]
        for x in bad:
            x[:, :, list(hidden)] = poison
        for each, clean, came in zip(NAMES, due, run(q, *bad, dout, **keywords), strict=True):
            np.testing.assert_allclose(came, clean, rtol=0, atol=1e-12, err_msg=f"{each} with {poison}")
            if each in ("dk", "dv"):
                assert (came[:, :, list(hidden)] == 0).all(), each


@poison_warns
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("size", "layout"), RINGS)
@pytest.mark.parametrize(
    "keywords", [{"causal": True}, {"window": (3, 2)}, {"causal": True, "key_lengths": [30, 30]}], ids=str
)
@pytest.mark.parametrize("where", ["k", "v"])
def test_poison_shows_in_the_rows_that_see_it_and_in_no_other(where, keywords, size, layout, kernels):
    key = 17
    q, k, v, dout = draw(9, "float64")
    visible = dict(keywords)
    seen = np.array([key in by_rows.keys_of(row, 0, 0, LENGTH, **visible) for row in range(LENGTH)])
    keywords = {**keywords, "ring_size": size, "layout": layout_of(layout, LENGTH, size), "kernels": kernels}
    due = run(q, k, v, dout, **keywords)
    {"k": k, "v": v}[where][:, :, key] = np.nan
    out, lse, dq, dk, dv = run(q, k, v, dout, **keywords)
    assert np.isnan(out[:, :, seen]).all()
    assert np.isnan(lse[:, :, seen]).all() == (where == "k")
    assert np.isnan(dq[:, :, seen]).all()
    for x, clean in ((out, due[0]), (lse, due[1]), (dq, due[2])):
        np.testing.assert_allclose(x[:, :, ~seen], clean[:, :, ~seen], rtol=0, atol=1e-12)
    # The poisoned rows spoil the gradients of every key that they see, and those of no other.
    spoiled = np.zeros(LENGTH, bool)
    for row in np.flatnonzero(seen):
        spoiled[by_rows.keys_of(row, 0, 0, LENGTH, **visible)] = True
    assert np.isnan(dk[:, :, spoiled]).all()
    for x, clean in ((dk, due[3]), (dv, due[4])):
        np.testing.assert_allclose(x[:, :, ~spoiled], clean[:, :, ~spoiled], rtol=0, atol=1e-12)


NOTHING_SEEN = {
    "no keys": {"key_lengths": [0, 0]},
    "masked": {"mask": np.zeros((1, 1, LENGTH, LENGTH), bool)},
    "bias of -inf": {"bias": np.full((1, 1, 1, LENGTH), -np.inf)},
    "causal, all in the future": {"causal": True, "query_offset": -LENGTH},
    "window beyond the keys": {"window": (2, 0), "query_offset": 3 * LENGTH},
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("size", "layout"), RINGS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", NOTHING_SEEN)
def test_rows_that_see_nothing_give_zero_minus_infinity_and_no_gradient(name, dtype, size, layout, kernels):
    arrays = draw(10, dtype)
    lse_dtype = "float64" if dtype == "float64" else "float32"
    dlse = np.ones(arrays[0].shape[:3], lse_dtype)
    where = {"ring_size": size, "layout": layout_of(layout, LENGTH, size), "kernels": kernels}
    out, lse, *gradients = run(*arrays, dlse, **NOTHING_SEEN[name], **where)
    assert (lse == -np.inf).all()
    for x in (out, *gradients):
        assert (x == 0).all()
        assert not np.signbit(x).any()


def masked_rows(*rows):
    mask = np.random.default_rng(1).random((2, 4, LENGTH, LENGTH)) < 0.5
    mask[:, :, list(rows)] = False
    return mask


# Which keywords leave which rows without a key, beside rows that see some.
BLIND = {
    "masked": ({"mask": masked_rows(10, 11, 12)}, [10, 11, 12]),
    "bias of -inf": ({"bias": np.where(masked_rows(0, 32), 0.5, -np.inf)}, [0, 32]),
    "before all keys": ({"causal": True, "query_offset": -5}, range(5)),
    "window beyond all keys": ({"window": (2, 0), "query_offset": 6}, range(LENGTH - 4, LENGTH)),
}


@poison_warns
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("size", "layout"), RINGS)
@pytest.mark.parametrize("name", BLIND)
def test_rows_that_see_nothing_among_others_give_zero_and_poison_nothing(name, size, layout, kernels):
    keywords, rows = BLIND[name]
    rows = list(rows)
    q, k, v, dout = draw(11, "float64")
    dlse = np.ones(q.shape[:3])
    keywords = {**keywords, "ring_size": size, "layout": layout_of(layout, LENGTH, size), "kernels": kernels}
    due = run(q, k, v, dout, dlse, **keywords)
    out, lse, dq, _, _ = due
    assert (out[:, :, rows] == 0).all()
    assert (lse[:, :, rows] == -np.inf).all()
    assert (dq[:, :, rows] == 0).all()
    assert np.isfinite(np.delete(lse, rows, axis=2)).all()
    # What such a row holds and is given does not matter either.
    q[:, :, rows], dout[:, :, rows], dlse[:, :, rows] = np.nan, np.inf, np.nan
    for each, x, clean in zip(NAMES, run(q, k, v, dout, dlse, **keywords), due, strict=True):
        np.testing.assert_allclose(x, clean, rtol=0, atol=1e-12, err_msg=each)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_zeros_of_either_sign_mean_the_same(name, size, kernels):
    arrays = dict(zip(("q", "k", "v", "dout"), draw(12, "float64"), strict=True))
    arrays["bias"] = np.zeros((1, 1, LENGTH, LENGTH))
    arrays[name][:, :, ::2] = 0.0
    other = {**arrays, name: np.where(arrays[name] == 0, -0.0, arrays[name])}
    assert np.signbit(other[name]).any()
    for first, second in zip(
        run(**arrays, causal=True, ring_size=size, kernels=kernels),
        run(**other, causal=True, ring_size=size, kernels=kernels),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_a_scale_of_zero_is_the_mean(scale, size):
    q, k, v, _ = draw(13, "float64")
    out = ring_attention(q, k, v, scale=scale, ring_size=size)
    mean = np.repeat(v.mean(axis=2, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=0, atol=1e-15)


def test_merging_nothing_keeps_the_sign_of_zero():
    """merge(empty, x) is x bit for bit: 0 * a + x would turn -0 into +0."""
    weighted = np.array([-0.0, 0.0, 1.5]).reshape(1, 1, 1, 3)
    part = ringcore.Partial(weighted, np.full((1, 1, 1), -0.0), np.ones((1, 1, 1)))
    empty = ringcore.empty_partial(weighted, 3)
    for merged in (ringcore.merge(empty, part), ringcore.merge(part, empty)):
        for field in ("weighted", "total"):
            assert getattr(merged, field).tobytes() == getattr(part, field).tobytes()
