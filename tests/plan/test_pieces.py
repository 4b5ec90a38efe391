"""Cutting tiles for kernels that know few bands: the same pairs, in forms that they take."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringcore.pieces import pieces
from ringcore.values import NOTHING, Band, Capabilities, Tile

BANDS = ("any", "windows", "triangles", "squares")
BOUNDS = (None, *range(-7, 8))
SIDES = (0, 1, 2, 5)


def tile_of(height, width, band, row_start=0, row_step=1, column_start=0, column_step=1):
    """A tile of strided rows and columns, whose positions are other numbers still, in two ranges where it can."""
    whole = slice(None)
    rows = slice(row_start, row_start + height * row_step, row_step)
    columns = slice(column_start, column_start + width * column_step, column_step)
    half = height // 2
    positions = tuple(r for r in (range(100, 100 + half), range(300, 300 + 2 * (height - half), 2)) if r)
    return Tile(whole, whole, whole, rows, columns, positions, (range(500, 500 + width),) if width else (), band)


def pairs(tile):
    """The visible (row, key) pairs: by their place in the arrays, and by their positions."""
    rows = range(100)[tile.rows]
    columns = range(100)[tile.columns]
    row_positions = [p for r in tile.row_positions for p in r]
    column_positions = [p for r in tile.column_positions for p in r]
    assert (len(rows), len(columns)) == (tile.height, tile.width) == (len(row_positions), len(column_positions))
    found = Counter()
    for i, j in product(range(tile.height), range(tile.width)):
        if (tile.band.lo is None or j - i >= tile.band.lo) and (tile.band.hi is None or j - i <= tile.band.hi):
            found[rows[i], columns[j], row_positions[i], column_positions[j]] += 1
    return found


def check(tile, bands, masked, strip):
    can = Capabilities("some", bands=bands, strip=strip)
    found = list(pieces(tile, can, masked))
    assert sum(map(pairs, found), Counter()) == pairs(tile)
    for piece in found:
        if bands == "any":
            assert piece == tile
            continue
        lo, hi = piece.band.lo, piece.band.hi
        assert piece.height
        assert piece.width
        assert piece.band == piece.band.clipped(piece.height, piece.width)
        assert piece.band != NOTHING
        if bands == "windows":
            # A window that is aligned in the lower right corner: on neither side negative, or beyond all columns.
            shift = piece.width - piece.height
            assert piece.band == Band() or shift >= 0
            assert lo is None or 0 <= shift - lo < piece.width
            assert hi is None or 0 <= hi - shift < piece.width
        elif masked:
            assert piece.height <= strip
        elif tile.band.clipped(tile.height, tile.width).lo is not None:
            assert piece.height <= strip or piece.band in (Band(), Band(None, 0))
        else:
            assert piece.band in (Band(), Band(None, 0))
            assert bands != "squares" or piece.band == Band() or piece.height == piece.width


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bands", BANDS)
def test_pieces_show_the_same_pairs(bands, masked):
    for height, width, lo, hi in product(SIDES, SIDES, BOUNDS, BOUNDS):
        check(tile_of(height, width, Band(lo, hi)), bands, masked, strip=2)


bounds = st.none() | st.integers(-30, 30)
sides = st.integers(0, 20)
steps = st.integers(1, 3)


@given(
    sides, sides, bounds, bounds, st.tuples(sides, steps, sides, steps), st.sampled_from(BANDS), st.booleans(), steps
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_pieces_of_any_tile_show_the_same_pairs(height, width, lo, hi, places, bands, masked, strip):
    check(tile_of(height, width, Band(lo, hi), *places), bands, masked, strip)


def test_a_causal_tile_is_one_piece():
    tile = tile_of(5, 5, Band(None, 0))
    for bands in BANDS:
        assert list(pieces(tile, Capabilities("some", bands=bands), masked=False)) == [
            replace(tile, rows=slice(0, 5, 1), columns=slice(0, 5, 1))
        ]
