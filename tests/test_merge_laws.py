"""The laws of the merge: partial results are a commutative monoid, on NumPy and on array-api-strict."""

from __future__ import annotations

import math
import warnings
from functools import reduce

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringcore import DtypeError, KeywordError, Partial, ShapeError, empty_partial, merge

DTYPES = ("float32", "float64")
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}  # a few roundings; rows hold a few terms of equal sign
WIDTH = 2
seeded = settings(max_examples=40, deadline=None, derandomize=True)


class Numpy:
    """NumPy; floating-point errors other than underflow raise."""

    name = "numpy"

    def make(self, x):
        return np.array(x)

    def back(self, x):
        return np.asarray(x)


class Strict(Numpy):
    """array-api-strict on a device that is not its default."""

    name = "strict"
    device = array_api_strict.Device("device1")

    def make(self, x):
        return array_api_strict.asarray(np.array(x), device=self.device)

    def back(self, x):
        assert x.device == self.device
        return np.asarray(x.to_device(array_api_strict.Device("CPU_DEVICE")))


libraries = pytest.mark.parametrize("library", [Numpy(), Strict()], ids=lambda library: library.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def partial(library, rows, dtype):
    """A partial [1, 1, S, 2] of rows (weighted, maximum, total)."""
    weighted = np.array([row[0] for row in rows], dtype).reshape(1, 1, len(rows), WIDTH)
    maximum, total = (np.array([row[i] for row in rows], dtype).reshape(1, 1, len(rows)) for i in (1, 2))
    return Partial(*(library.make(x) for x in (weighted, maximum, total)))


def fields(library, part):
    return [library.back(x) for x in (part.weighted, part.maximum, part.total)]


def bits(library, part):
    """Every bit of a partial: -0.0 and 0.0 differ, NaN is itself."""
    return [(x.dtype.name, x.shape, x.tobytes()) for x in fields(library, part)]


def empty(library, count, dtype):
    return empty_partial(library.make(np.zeros((1, 1, count, 3), dtype)), WIDTH)


def sane(library, part):
    """The partial's out and lse, of which neither may be NaN."""
    out, lse = library.back(part.out), library.back(part.lse)
    assert not np.isnan(out).any()
    assert not np.isnan(lse).any()
    return out, lse


def near(came, due, tolerance):
    seen = np.isfinite(due)
    assert (came[~seen] == due[~seen]).all()
    assert (np.abs(came[seen] - due[seen]) <= tolerance * np.maximum(1, np.abs(due[seen]))).all()


@pytest.fixture(autouse=True)
def no_floating_point_errors():
    with np.errstate(divide="raise", over="raise", invalid="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def numbers(dtype, **limits):
    width = 32 if dtype == "float32" else 64
    return st.floats(width=width, allow_nan=False, allow_infinity=False, **limits)


def rows_of(dtype, anything=False):
    """Rows as attention makes them, or with ``anything``, any numbers at all in a row that saw a key."""
    if anything:
        each = st.tuples(
            st.tuples(numbers(dtype), numbers(dtype)),
            numbers(dtype),
            numbers(dtype, min_value=0.0, exclude_min=True),
        )
    else:
        value, total = st.floats(0.5, 2.0, width=32), st.floats(1.0, 9.0, width=32)
        # Near each other, so that both sides weigh, or far apart.
        maximum = st.floats(-2, 2, width=32) | st.floats(-60, 60, width=32)
        each = st.builds(
            lambda v, w, maximum, total: ((v * total, w * total), maximum, total),
            value, value, maximum, total,
        )  # fmt: skip
    return st.lists(each, min_size=1, max_size=4)


def some_rows(data, dtype, count):
    return data.draw(rows_of(dtype).map(lambda rows: (rows * count)[:count]))


EMPTY_ROW = ((0.0, 0.0), -math.inf, 0.0)


# Identity


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_merge_with_an_empty_partial_changes_no_bit(library, dtype, data):
    rows = data.draw(rows_of(dtype, anything=True))
    part, nothing = partial(library, rows, dtype), empty(library, len(rows), dtype)
    assert bits(library, merge(nothing, part)) == bits(library, part)
    assert bits(library, merge(part, nothing)) == bits(library, part)


@libraries
@dtypes
def test_merge_with_an_empty_partial_keeps_signs_extremes_and_nan(library, dtype):
    limits = np.finfo(dtype)
    rows = [
        ((-0.0, 0.0), -0.0, 1.0),
        ((limits.max, -limits.max), limits.max, limits.max),
        ((limits.smallest_subnormal, -limits.smallest_subnormal), limits.min, limits.smallest_subnormal),
        ((math.nan, 1.0), 2.0, 3.0),
        ((1.0, 1.0), math.nan, math.nan),
        ((math.inf, -math.inf), 1.0, 1.0),
    ]
    part, nothing = partial(library, rows, dtype), empty(library, len(rows), dtype)
    assert bits(library, merge(nothing, part)) == bits(library, part)
    assert bits(library, merge(part, nothing)) == bits(library, part)


@libraries
@dtypes
def test_merge_of_empty_partials_is_empty(library, dtype):
    nothing = empty(library, 3, dtype)
    both = merge(nothing, nothing)
    assert bits(library, both) == bits(library, nothing)
    out, lse = sane(library, both)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_merge_chooses_row_by_row(library, dtype, data):
    # Some rows are empty on the left, some on the right, some on both sides.
    rows = data.draw(rows_of(dtype, anything=True))
    sides = data.draw(st.lists(st.sampled_from("lrn"), min_size=len(rows), max_size=len(rows)))
    first = partial(library, [row if side == "l" else EMPTY_ROW for row, side in zip(rows, sides, strict=True)], dtype)
    second = partial(library, [row if side == "r" else EMPTY_ROW for row, side in zip(rows, sides, strict=True)], dtype)
    due = partial(library, [EMPTY_ROW if side == "n" else row for row, side in zip(rows, sides, strict=True)], dtype)
    assert bits(library, merge(first, second)) == bits(library, due)


ANY = [0.0, -0.0, 1.0, -7.5, math.nan, math.inf, -math.inf]
GARBAGE = st.one_of(
    # An empty row is one whose maximum is -inf or whose total is 0; the rest of it is nobody's business.
    st.tuples(st.tuples(st.sampled_from(ANY), st.sampled_from(ANY)), st.just(-math.inf), st.sampled_from(ANY)),
    st.tuples(st.tuples(st.sampled_from(ANY), st.sampled_from(ANY)), st.sampled_from(ANY), st.just(0.0)),
)


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_garbage_under_empty_rows_never_leaks(library, dtype, data):
    garbage = data.draw(st.lists(GARBAGE, min_size=1, max_size=4))
    count = len(garbage)
    rows = some_rows(data, dtype, count)
    part, dirt, nothing = partial(library, rows, dtype), partial(library, garbage, dtype), empty(library, count, dtype)
    assert bits(library, merge(dirt, part)) == bits(library, part)
    assert bits(library, merge(part, dirt)) == bits(library, part)
    assert bits(library, merge(dirt, dirt)) == bits(library, nothing)
    out, lse = sane(library, dirt)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


# Order


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_merge_is_commutative(library, dtype, data):
    rows = data.draw(rows_of(dtype))
    first, second = partial(library, rows, dtype), partial(library, some_rows(data, dtype, len(rows)), dtype)
    # Exactly, for a sum and a maximum of two numbers have no order; the sign of a zero maximum may differ.
    for came, due in zip(fields(library, merge(first, second)), fields(library, merge(second, first)), strict=True):
        assert (came == due).all()


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_merge_is_associative(library, dtype, data):
    rows = data.draw(rows_of(dtype))
    first, second, third = (
        partial(library, some, dtype)
        for some in (rows, some_rows(data, dtype, len(rows)), some_rows(data, dtype, len(rows)))
    )
    left, right = merge(merge(first, second), third), merge(first, merge(second, third))
    for came, due in zip(sane(library, left), sane(library, right), strict=True):
        near(came, due, TOLERANCE[dtype])


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_merge_of_chunks_is_attention_over_all_keys(library, dtype, data):
    score = st.floats(-2, 2, width=32) | st.floats(-300, 300, width=32) | st.just(-math.inf)
    scores = data.draw(st.lists(score, min_size=1, max_size=12))
    values = data.draw(st.lists(st.floats(1, 4, width=32), min_size=len(scores), max_size=len(scores)))
    owners = data.draw(st.lists(st.integers(0, 4), min_size=len(scores), max_size=len(scores)))

    def chunk(owner):
        keys = [(s, v) for s, v, o in zip(scores, values, owners, strict=True) if o == owner and s > -math.inf]
        if not keys:
            return partial(library, [EMPTY_ROW], dtype)
        top = max(s for s, _ in keys)
        weights = [math.exp(s - top) for s, _ in keys]
        weighted = math.fsum(w * v for w, (_, v) in zip(weights, keys, strict=True))
        return partial(library, [((weighted, -weighted), top, math.fsum(weights))], dtype)

    out, lse = sane(library, reduce(merge, map(chunk, range(5))))
    seen = [(s, v) for s, v in zip(scores, values, strict=True) if s > -math.inf]
    if not seen:
        assert (out == 0).all()
        assert lse == -math.inf
        return
    top = max(s for s, _ in seen)
    total = math.fsum(math.exp(s - top) for s, _ in seen)
    due = math.fsum(math.exp(s - top) * v for s, v in seen) / total
    near(out, np.array([due, -due]).reshape(out.shape), 4 * TOLERANCE[dtype])
    near(lse, np.array(top + math.log(total)).reshape(lse.shape), 4 * TOLERANCE[dtype])


# Arithmetic


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_values_of_one_stay_one_however_often_chunks_are_merged(library, dtype, data):
    # weighted and total go through the same roundings, so their ratio is exact for any weights.
    chunks = data.draw(
        st.lists(st.tuples(st.floats(-3, 3) | st.floats(-500, 500), st.floats(1, 50)), min_size=1, max_size=20)
    )
    parts = [partial(library, [((total, total), maximum, total)], dtype) for maximum, total in chunks]
    assert (library.back(reduce(merge, parts).out) == 1).all()


@libraries
@dtypes
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_merging_one_chunk_many_times_counts_it_exactly(library, dtype, count):
    out = library.make(np.ones((1, 1, 2, WIDTH), dtype))
    part = Partial.from_lse(out, library.make(np.array([[[3.25, -1e4]]], dtype)))
    merged = reduce(merge, [part] * count)
    weighted, maximum, total = fields(library, merged)
    assert (weighted == count).all()
    assert (total == count).all()
    assert maximum.ravel().tolist() == [3.25, -1e4]
    assert (library.back(merged.out) == 1).all()


@libraries
@dtypes
@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0, 20.0, 88.0, 89.0, 104.0, 745.0, 1e3, 1e4])
@pytest.mark.parametrize("base", [0.0, 5e3, -5e3])
def test_gaps_of_any_width_neither_overflow_nor_lose_the_larger_part(library, dtype, gap, base):
    low, high = (
        partial(library, [((value * 2.0, value * -2.0), maximum, 2.0)], dtype)
        for value, maximum in ((3.0, base), (5.0, base + gap))
    )
    top = float(library.back(high.maximum)[0, 0, 0])
    weight = math.exp(base - top)
    due = (5.0 + 3.0 * weight) / (1.0 + weight)
    for merged in (merge(low, high), merge(high, low)):
        out, lse = sane(library, merged)
        near(out, np.array([due, -due]).reshape(out.shape), TOLERANCE[dtype])
        near(lse.ravel(), np.array([top + math.log(2) + math.log1p(weight)]), TOLERANCE[dtype])


@libraries
@dtypes
def test_rows_of_the_smallest_score_count_every_key(library, dtype):
    # The mask of many model libraries: a row of nothing but finfo.min is uniform attention, and unequal chunks of it
    # weigh as their numbers of keys. With (out, lse) alone they would weigh the same.
    smallest = float(np.finfo(dtype).min)
    three, five = (partial(library, [((n * v, -n * v), smallest, n)], dtype) for n, v in ((3.0, 1.0), (5.0, 9.0)))
    merged = merge(three, five)
    weighted, maximum, total = fields(library, merged)
    assert total.ravel().tolist() == [8.0]
    assert maximum.ravel().tolist() == [smallest]
    assert library.back(merged.out).ravel().tolist() == [6.0, -6.0]
    assert weighted.ravel().tolist() == [48.0, -48.0]
    seen = partial(library, [((2.0, 2.0), 0.0, 1.0)], dtype)
    assert bits(library, merge(merged, seen)) == bits(library, seen)
    assert bits(library, merge(seen, merged)) == bits(library, seen)
    nothing = empty(library, 1, dtype)
    assert bits(library, merge(merged, nothing)) == bits(library, merged)


@libraries
@dtypes
def test_inputs_of_a_merge_are_not_changed(library, dtype):
    rows = [((1.0, 2.0), 3.0, 4.0), EMPTY_ROW, ((math.nan, 1.0), -math.inf, 7.0)]
    first, second = partial(library, rows, dtype), partial(library, rows[::-1], dtype)
    kept = bits(library, first), bits(library, second)
    merge(first, second)
    assert (bits(library, first), bits(library, second)) == kept


# Outputs with their log-sum-exp


@libraries
@dtypes
@given(data=st.data())
@seeded
def test_from_lse_gives_back_what_it_was_given(library, dtype, data):
    rows = data.draw(rows_of(dtype, anything=True))
    out = library.make(np.array([row[0] for row in rows], dtype).reshape(1, 1, -1, WIDTH))
    lse = library.make(np.array([row[1] for row in rows], dtype).reshape(1, 1, -1))
    part = Partial.from_lse(out, lse)
    assert library.back(part.out).tobytes() == library.back(out).tobytes()
    assert (library.back(part.lse) == library.back(lse)).all()


@libraries
@dtypes
def test_from_lse_makes_rows_without_keys_empty(library, dtype):
    out = np.array([[1.0, 2.0], [math.nan, math.inf], [5.0, 6.0]], dtype).reshape(1, 1, 3, WIDTH)
    lse = np.array([[[0.5, -math.inf, -math.inf]]], dtype)
    part = Partial.from_lse(library.make(out), library.make(lse))
    due = partial(library, [((1.0, 2.0), 0.5, 1.0), EMPTY_ROW, EMPTY_ROW], dtype)
    assert bits(library, part) == bits(library, due)


@libraries
@dtypes
def test_from_lse_refuses_plus_infinity(library, dtype):
    out, lse = np.zeros((1, 1, 2, WIDTH), dtype), np.array([[[0.0, math.inf]]], dtype)
    with pytest.raises(KeywordError, match="inf"):
        Partial.from_lse(library.make(out), library.make(lse))


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=lambda half: half.__name__)
def test_from_lse_refuses_an_lse_in_a_half_type(half):
    with pytest.raises(DtypeError, match=half.__name__):
        Partial.from_lse(np.zeros((1, 1, 3, WIDTH), half), np.zeros((1, 1, 3), half))


@libraries
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 3), (1, 1, 3, 1), (3, 1, 1), (1, 1, 3, WIDTH)])
def test_from_lse_refuses_an_lse_of_another_shape(library, shape):
    with pytest.raises(ShapeError, match="lse has shape"):
        Partial.from_lse(library.make(np.zeros((1, 1, 3, WIDTH))), library.make(np.zeros(shape)))


@libraries
@pytest.mark.parametrize("changed", ["weighted", "maximum", "total"])
def test_merge_refuses_partials_of_other_shapes(library, changed):
    part = partial(library, [((1.0, 2.0), 3.0, 4.0)] * 3, "float64")
    # One row would broadcast, were it not refused.
    other = {name: getattr(part, name) for name in ("weighted", "maximum", "total")}
    other[changed] = other[changed][:, :, :1, ...]
    for pair in ((part, Partial(**other)), (Partial(**other), part)):
        with pytest.raises(ShapeError, match=changed):
            merge(*pair)


@pytest.mark.parametrize("lse_dtype", DTYPES)
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=lambda half: half.__name__)
def test_merge_promotes_an_out_in_a_half_type(half, lse_dtype):
    # A fused kernel returns its out in the input's half type; sums of it must not stay there.
    library = Numpy()
    out = np.array([1.0, 2.0], half).reshape(1, 1, 1, WIDTH)
    part = Partial.from_lse(out, np.zeros((1, 1, 1), lse_dtype))
    assert part.weighted.dtype == half
    merged = reduce(merge, [part] * 4097)
    assert {x.dtype.name for x in fields(library, merged)} == {lse_dtype}
    assert part.out.dtype == merged.out.dtype == lse_dtype
    # 4097 needs more bits than a half type has.
    assert merged.weighted.ravel().tolist() == [4097.0, 8194.0]
    assert merged.out.ravel().tolist() == [1.0, 2.0]
    nothing = empty(library, 1, half)
    for both in (merge(part, nothing), merge(nothing, part)):
        assert {x.dtype.name for x in fields(library, both)} == {lse_dtype}


@libraries
@given(data=st.data())
@seeded
def test_merge_of_mixed_dtypes_is_in_the_wider_one(library, data):
    rows = data.draw(rows_of("float32"))
    narrow, wide = partial(library, rows, "float32"), partial(library, some_rows(data, "float64", len(rows)), "float64")
    widened = Partial(*(library.make(x.astype("float64")) for x in fields(library, narrow)))
    assert bits(library, merge(narrow, wide)) == bits(library, merge(widened, wide))
    assert bits(library, merge(wide, narrow)) == bits(library, merge(wide, widened))


@libraries
@dtypes
def test_empty_partials_are_kept_in_the_dtype_of_float_inputs(library, dtype):
    part = empty_partial(library.make(np.ones((2, 3, 4, 5), dtype)), 7)
    weighted, maximum, total = fields(library, part)
    assert (weighted.shape, maximum.shape, total.shape) == ((2, 3, 4, 7), (2, 3, 4), (2, 3, 4))
    assert {x.dtype.name for x in (weighted, maximum, total)} == {dtype}
    assert not weighted.any()
    assert not total.any()
    assert (maximum == -math.inf).all()


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=lambda half: half.__name__)
def test_empty_partials_of_half_types_are_kept_in_float32(half):
    part = empty_partial(np.ones((1, 1, 2, 3), half), WIDTH)
    assert {x.dtype.name for x in fields(Numpy(), part)} == {"float32"}
