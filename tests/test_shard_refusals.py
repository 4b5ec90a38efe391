"""Layouts, shards and partials that do not fit: one clear error."""

import pytest
from given import Q, V, refused

import ringcore
from ringcore import DtypeError, KeywordError, LayoutError, ShapeError


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ringcore.contiguous(6, 0), ["6 positions over 0 ranks", "1 rank or more"]),
        (lambda: ringcore.zigzag(6, -1), ["6 positions over -1 ranks", "1 rank or more"]),
        (lambda: ringcore.striped(-6, 2), ["-6 positions over 2 ranks", "0 positions or more"]),
        (lambda: ringcore.from_lengths([3, -1]), ["[3, -1]", "0 rows or more"]),
        (lambda: ringcore.from_lengths([]), ["no shards", "at least one rank"]),
        (lambda: ringcore.Layout(()), ["no shards", "at least one rank"]),
        (lambda: ringcore.Layout(((0, 1), (2, 3))), ["rank 0 holds 0", "ranges with a positive step"]),
        (lambda: ringcore.Layout(((range(3, 0, -1),),)), ["rank 0 holds range(3, 0, -1)", "positive step"]),
        (lambda: ringcore.Layout(((range(3),), (range(2, 5),))), ["rank 1 holds range(2, 5)", "another range"]),
        (lambda: ringcore.Layout(((range(3),), (range(4, 6),))), ["rank 1 holds range(4, 6)", "0 to 4"]),
        (lambda: ringcore.shard(Q, "zigzag", 2, 2), ["rank is 2", "0 to 1"]),
        (lambda: ringcore.shard(Q, "spiral", 0, 2), ["layout is 'spiral'", "zigzag"]),
        (lambda: ringcore.shard(Q, ringcore.zigzag(5, 2), 0, 2), ["deals 5 positions", "x has 6 positions"]),
        (lambda: ringcore.unshard([Q, Q[:, :, :3]], "zigzag"), ["parts has 6 rows on rank 0", "5 of 9"]),
    ],
)
def test_layouts_that_deal_no_sequence_are_refused(make, said):
    refused(make, LayoutError, said)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: ringcore.shard(Q, "zigzag", 0, 2, axis=7), ShapeError, ["axis is 7", "4 axes"]),
        (lambda: ringcore.shard(Q.tolist(), "zigzag", 0, 2), DtypeError, ["a list was given", "an array"]),
        (lambda: ringcore.unshard([], "zigzag"), ShapeError, ["parts is empty", "one shard for each rank"]),
        (
            lambda: ringcore.unshard([Q, Q[:, :1]], "zigzag"),
            ShapeError,
            ["rank 1 has shape (2, 1, 6, 4)", "axis 2 alone"],
        ),
        (
            lambda: ringcore.unshard([Q, Q[0]], "zigzag", axis=1),
            ShapeError,
            ["rank 1 has shape (4, 6, 4)", "(2, 4, 6, 4)"],
        ),
        (lambda: ringcore.unshard([Q, Q.astype("float32")], "zigzag"), DtypeError, ["rank 1 holds float32", "float64"]),
        (
            lambda: ringcore.Partial.from_lse(V, V[..., :1]),
            ShapeError,
            ["lse has shape (2, 2, 6, 1)", "needs (2, 2, 6)"],
        ),
        (lambda: ringcore.Partial.from_lse(V, V[..., 0] + float("inf")), KeywordError, ["+inf", "-inf"]),
        (
            lambda: ringcore.merge(ringcore.empty_partial(Q, 3), ringcore.empty_partial(Q, 2)),
            ShapeError,
            ["weighted has shape (2, 4, 6, 3)", "(2, 4, 6, 2)", "same queries"],
        ),
    ],
)
def test_shards_and_partials_that_do_not_fit_are_refused(make, error, said):
    refused(make, error, said)
