"""Partials as fused kernels return them, and their merge: what the ring's own kernels never reach."""

import math

import numpy as np
import pytest

from ringcore import DtypeError, KeywordError, Partial, empty_partial, merge

RNG = np.random.default_rng(11)
SCORES = RNG.standard_normal((1, 2, 3, 10))
VALUES = RNG.standard_normal((1, 2, 10, 4))


def softmax(keys):
    """out and lse over some of the keys, from the definition."""
    weights = np.exp(SCORES[..., keys])
    total = weights.sum(-1)
    return weights @ VALUES[:, :, keys] / total[..., None], np.log(total)


def seen_partial():
    return Partial(np.array([[[[-0.0, 2.0, -3.0]]]]), np.full((1, 1, 1), 5.0), np.full((1, 1, 1), 1.5))


def test_chunks_of_unequal_lengths_weigh_by_their_denominators():
    both = merge(*(Partial.from_lse(*softmax(keys)) for keys in (slice(0, 7), slice(7, 10))))
    out, lse = softmax(slice(None))
    np.testing.assert_allclose(both.out, out, rtol=1e-13)
    np.testing.assert_allclose(both.lse, lse, rtol=1e-13)


def test_empty_row_of_a_kernel_weighs_nothing_whatever_it_holds():
    out, lse = softmax(slice(None))
    garbage, nothing = np.full_like(out, np.nan), np.full_like(lse, -math.inf)
    empty = Partial.from_lse(garbage, nothing)
    assert (empty.weighted == 0).all()
    assert (empty.total == 0).all()
    for both in (merge(Partial.from_lse(out, lse), empty), merge(empty, Partial.from_lse(out, lse))):
        np.testing.assert_array_equal(both.out, out)


def test_inf_sentinel_of_a_kernel_is_refused():
    out, lse = softmax(slice(None))
    lse[0, 0, 0] = math.inf
    with pytest.raises(KeywordError, match="inf"):
        Partial.from_lse(out, lse)


def test_half_lse_of_a_kernel_is_refused():
    out, lse = softmax(slice(None))
    with pytest.raises(DtypeError, match="float16"):
        Partial.from_lse(out, lse.astype(np.float16))


@pytest.mark.parametrize(("maximum", "total"), [(-math.inf, 7.0), (3.0, 0.0)])
def test_what_unseen_rows_hold_never_leaks(maximum, total):
    seen = seen_partial()
    for payload in (math.nan, math.inf):
        unseen = Partial(np.full((1, 1, 1, 3), payload), np.full((1, 1, 1), maximum), np.full((1, 1, 1), total))
        both = merge(unseen, unseen)
        assert (both.weighted == 0).all()
        for both in (merge(unseen, seen), merge(seen, unseen)):
            np.testing.assert_array_equal(both.weighted, seen.weighted)
            np.testing.assert_array_equal(both.maximum, seen.maximum)


def test_empty_partial_leaves_the_bits_of_the_other():
    seen = seen_partial()
    empty = empty_partial(np.zeros((1, 1, 1, 2)), 3)
    for both in (merge(empty, seen), merge(seen, empty)):
        for name in ("weighted", "maximum", "total"):
            assert getattr(both, name).tobytes() == getattr(seen, name).tobytes(), name
