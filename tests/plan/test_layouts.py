"""Layouts: every position is owned once, where its definition says."""

import pytest
from deals import DEALS, deal, layouts
from hypothesis import given, settings
from hypothesis import strategies as st

import ringcore
from ringcore import Layout, LayoutError

LENGTHS = (0, 1, 2, 7, 12, 13, 16, 37)
NAMES = [name for name in DEALS if "," not in name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", range(1, 9))
def test_layouts_own_every_position_once(name, size):
    for length in LENGTHS:
        layout = deal(name, length, size)
        owned = [position for rank in range(size) for position in layout.positions(rank)]
        assert sorted(owned) == list(range(length))
        assert layout.lengths == tuple(len(layout.positions(rank)) for rank in range(size))
        assert (layout.size, layout.length) == (size, length)


@given(st.data())
@settings(deadline=None, derandomize=True)
def test_layouts_drawn_at_random_own_every_position_once(data):
    length, size = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 6))
    layout = data.draw(layouts(length, size))
    assert sorted(p for rank in range(size) for p in layout.positions(rank)) == list(range(length))


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("length", LENGTHS)
def test_layouts_by_name_are_their_definitions(length, size):
    def piece(index, count):
        # The first length % count pieces are one longer.
        return [p for p in range(length) if owner(p, count) == index]

    def owner(position, count):
        short, longer = divmod(length, count)
        head = longer * (short + 1)
        return position // (short + 1) if position < head else longer + (position - head) // short

    for rank in range(size):
        assert ringcore.contiguous(length, size).positions(rank) == piece(rank, size)
        assert ringcore.striped(length, size).positions(rank) == [p for p in range(length) if p % size == rank]
        both = piece(rank, 2 * size) + piece(2 * size - 1 - rank, 2 * size)
        assert ringcore.zigzag(length, size).positions(rank) == both


@pytest.mark.parametrize("size", range(1, 9))
def test_layouts_by_name_are_even(size):
    for name in ("contiguous", "zigzag", "striped"):
        for length in LENGTHS:
            lengths = deal(name, length, size).lengths
            assert max(lengths) - min(lengths) <= (2 if name == "zigzag" else 1)


@pytest.mark.parametrize(
    "shards",
    [
        (),
        ((range(3),), (range(2, 5),)),
        ((range(3),), (range(4, 6),)),
        ((range(0, 6, 2),), (range(0, 6, 3),)),
        ((range(1, 4),),),
        ((range(-1, 2),),),
        ((range(3, -1, -1),),),
        ((range(2), range(1, 3)),),
    ],
)
def test_layouts_that_are_no_partition_are_refused(shards):
    with pytest.raises(LayoutError):
        Layout(shards)
