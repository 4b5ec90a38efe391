"""Bands: each of their short cuts against looking at every pair."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringcore.values import NOTHING, Band

BOUNDS = st.none() | st.integers(-9, 9)
BANDS = st.builds(Band, BOUNDS, BOUNDS)
SIDES = st.integers(0, 6)
seeded = settings(max_examples=300, deadline=None, derandomize=True)


@st.composite
def spans(draw, longest=6):
    start = draw(st.integers(0, longest))
    return start, draw(st.integers(start, longest))


def shows(band, i, j):
    return (band.lo is None or j - i >= band.lo) and (band.hi is None or j - i <= band.hi)


def shown(band, height, width):
    return {(i, j) for i, j in product(range(height), range(width)) if shows(band, i, j)}


@seeded
@given(BANDS, SIDES, SIDES)
def test_clipped_bands_show_the_same_pairs(band, height, width):
    assert shown(band.clipped(height, width), height, width) == shown(band, height, width)


@pytest.mark.parametrize("width", range(5))
@pytest.mark.parametrize("height", range(5))
def test_clipped_bands_are_equal_exactly_where_they_show_the_same_pairs(height, width):
    bounds = [None, *range(-6, 7)]
    names = {}
    for band in (Band(lo, hi) for lo, hi in product(bounds, repeat=2)):
        names.setdefault(frozenset(shown(band, height, width)), set()).add(band.clipped(height, width))
    assert all(len(clipped) == 1 for clipped in names.values())
    assert len(set.union(*names.values())) == len(names)
    assert names[frozenset()] == {NOTHING}
    if height and width:
        assert names[frozenset(product(range(height), range(width)))] == {Band()}


@seeded
@given(BANDS, st.integers(-4, 4), st.integers(-4, 4))
def test_shifted_bands_show_the_same_pairs_from_another_origin(band, rows, columns):
    moved = band.shifted(rows, columns)
    for i, j in product(range(-6, 7), repeat=2):
        assert shows(moved, i, j) == shows(band, i + rows, j + columns)


@seeded
@given(BANDS, spans(), st.integers(0, 6))
def test_columns_are_those_that_some_row_sees(band, rows, width):
    seen = {j for i, j in product(range(*rows), range(width)) if shows(band, i, j)}
    first, stop = band.columns(*rows, width)
    assert first <= stop
    assert seen <= set(range(first, stop))
    if seen:
        assert seen == set(range(first, stop))


@seeded
@given(BANDS, spans(), st.integers(0, 6))
def test_rows_are_those_that_see_some_column(band, columns, height):
    seen = {i for i, j in product(range(height), range(*columns)) if shows(band, i, j)}
    first, stop = band.rows(*columns, height)
    assert first <= stop
    assert seen <= set(range(first, stop))
    if seen:
        assert seen == set(range(first, stop))


@seeded
@given(BANDS, spans(), spans())
def test_a_band_covers_ranges_whose_every_pair_it_shows(band, rows, columns):
    if rows[0] < rows[1] and columns[0] < columns[1]:
        every = all(shows(band, i, j) for i, j in product(range(*rows), range(*columns)))
        assert band.covers(rows, columns) == every
