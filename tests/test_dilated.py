"""Dilated attention: what it is equal to, what it costs, and what it refuses. Exactness is the conformance suite's."""

import numpy as np
import pytest
from given import K, Q, V, refused, torch

import ringcore
from ringcore import KeywordError, ShapeError, dilated_attention, dilated_attention_vjp
from ringcore.balance import lightest, pairs
from ringcore.dilation import Dilation
from ringcore.schedule import ring_plans
from ringcore.testing import meaning
from ringcore.tiling import Visibility

RIGHT = {"segment_lengths": (4, 6), "dilation_rates": (1, 2)}

WRONG = {
    "no branch": (
        {"segment_lengths": (), "dilation_rates": ()},
        "segment_lengths is []; it must hold a number for each",
    ),
    "a number": ({"segment_lengths": 4}, "segment_lengths is 4; it must hold a whole number for each branch"),
    "text": ({"dilation_rates": "12"}, "dilation_rates is '12'"),
    "length 0": (
        {"segment_lengths": (4, 0)},
        "segment_lengths is [4, 0]; it must hold a number for each branch, each 1 or more",
    ),
    "rate below 1": ({"dilation_rates": (1, -2)}, "dilation_rates is [1, -2]"),
    "a fraction": ({"dilation_rates": (1, 1.5)}, "dilation_rates is (1, 1.5); it must hold a whole number"),
    "a flag": ({"dilation_rates": (True, 2)}, "dilation_rates is (True, 2)"),
    "more rates": ({"dilation_rates": (1, 2, 3)}, "there are 2 segment_lengths and 3 dilation_rates"),
    "another offset": ({"head_offset": "none"}, 'head_offset is \'none\'; it must be "modulo" or "block"'),
    "return_lse": ({"return_lse": "yes"}, "return_lse is 'yes'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_branches_are_refused(name):
    changes, said = WRONG[name]
    refused(lambda: dilated_attention(Q, K, V, **{**RIGHT, **changes}), KeywordError, [said])
    if "return_lse" not in changes:
        refused(lambda: dilated_attention_vjp(Q, K, V, **{**RIGHT, **changes}), KeywordError, [said])


@pytest.mark.parametrize(
    "made", [np.array, range, lambda x: [np.int64(n) for n in x]], ids=["array", "range", "scalars"]
)
def test_branches_are_taken_in_every_form(made):
    given = {"segment_lengths": [2, 3], "dilation_rates": [1, 2]}
    due = dilated_attention(Q, K, V, **given)
    forms = {name: range(x[0], x[1] + 1) if made is range else made(x) for name, x in given.items()}
    np.testing.assert_array_equal(dilated_attention(Q, K, V, **forms), due)
    ((out, _), _) = dilated_attention_vjp(Q, K, V, **forms)
    np.testing.assert_array_equal(out, due)


def test_a_rate_beyond_all_positions_keeps_the_first_of_a_segment():
    t = torch()
    q, k, v = (t.from_numpy(x) for x in (Q, K, V))
    for rate in (10**18, 10**30):
        out = dilated_attention(q, k, v, segment_lengths=[10**30], dilation_rates=[rate])
        np.testing.assert_allclose(
            out, dilated_attention(Q, K, V, segment_lengths=[6], dilation_rates=[50]), atol=1e-14
        )


def test_q_and_k_of_different_lengths_are_refused():
    said = ["q has 5 rows over all ranks, and k has 6", "of one sequence with itself"]
    refused(lambda: dilated_attention(Q[:, :, :5], K, V, **RIGHT), ShapeError, said)


def test_one_branch_over_all_positions_is_attention():
    due, lse = ringcore.ring_attention(Q, K, V, causal=True, return_lse=True)
    for length in (6, 100):
        out, own = dilated_attention(
            Q, K, V, segment_lengths=[length], dilation_rates=[1], causal=True, return_lse=True
        )
        np.testing.assert_allclose(out, due, atol=1e-13)
        np.testing.assert_allclose(own, lse, atol=1e-13)


def test_branches_twice_change_lse_alone():
    out, lse = dilated_attention(Q, K, V, segment_lengths=[4], dilation_rates=[2], return_lse=True)
    same, more = dilated_attention(Q, K, V, segment_lengths=[4, 4], dilation_rates=[2, 2], return_lse=True)
    np.testing.assert_allclose(same, out, atol=1e-13)
    seen = lse > -np.inf
    np.testing.assert_allclose(more[seen], lse[seen] + np.log(2), atol=1e-13)
    assert not seen.all()


def test_segments_are_documents_where_the_rate_is_1():
    due = ringcore.ring_attention(Q, K, V, cu_seqlens=[0, 4, 6], causal=True)
    out = dilated_attention(Q, K, V, segment_lengths=[4], dilation_rates=[1], causal=True)
    np.testing.assert_allclose(out, due, atol=1e-13)


def test_the_gradient_goes_through_the_mixture_of_branches():
    """By differences: what stops it at the mixture's weights is off by far more."""
    rng = np.random.default_rng(3)
    dout = rng.standard_normal((2, 4, 6, 3))
    _, pullback = dilated_attention_vjp(Q, K, V, **RIGHT, ring_size=2)
    for name, gradient in zip("qkv", pullback(dout), strict=True):
        arrays = {"q": Q, "k": K, "v": V}
        step = 1e-6 * rng.standard_normal(arrays[name].shape)
        ends = [
            (dilated_attention(**{**arrays, name: arrays[name] + sign * step}, **RIGHT) * dout).sum()
            for sign in (1, -1)
        ]
        assert abs(ends[0] - ends[1] - 2 * (gradient * step).sum()) < 1e-10


def test_auto_deals_the_work_evenly():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 2, 64, 4)) for _ in range(3))
    branches = {"segment_lengths": [16, 64], "dilation_rates": [1, 4], "causal": True}
    due = dilated_attention(q, k, v, **branches)
    np.testing.assert_allclose(dilated_attention(q, k, v, **branches, ring_size=4, layout="auto"), due, atol=1e-13)
    length = 131_072  # of which a launch is little
    dilation = Dilation(((4096, 1), (length, 8)))
    seen = Visibility(True, (None, None), (0,), (length,), heads=16, key_heads=16, dilation=dilation)
    work = []
    for plan in ring_plans(*lightest(seen, length, length, 4), seen):
        work.append(sum(pairs(tile) * tile.heads for tile in plan.tiles))
    assert max(work) <= 1.05 * sum(work) / 4


@pytest.mark.parametrize("head_offset", ["modulo", "block"])
def test_dropout_takes_a_pair_away_in_every_branch_that_shows_it(head_offset):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, 5, 24, 4)) for _ in range(3))
    branches = {"segment_lengths": [8, 12, 24], "dilation_rates": [1, 2, 3], "head_offset": head_offset}
    kept = meaning.kept_pairs(0.4, 6, 2, 5, np.tile(np.arange(24), (2, 1)), np.arange(24))
    power = sum(meaning.branches(5, 24, branches)) * np.exp(np.einsum("bhsd,bhtd->bhst", q, k) / 2)
    due = (power / power.sum(-1, keepdims=True) * kept) @ v
    out = dilated_attention(q, k, v, **branches, dropout=0.4, dropout_seed=6, ring_size=2)
    np.testing.assert_allclose(out, due, atol=1e-12)
