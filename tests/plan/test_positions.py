"""Masks asked by positions: every visible pair is in one block, and blocks that an interval settles are not asked for."""

from __future__ import annotations

import numpy as np
import pytest

import ringcore
from ringcore import forward_work, positions
from ringcore.values import Band, Tile

BANDS = [Band(), Band(None, 0), Band(-3, 2), Band(4, None), Band(-30, -5)]


def tile_of(rows, columns, band):
    sides = (slice(0, len(side)) for side in (rows, columns))
    return Tile(slice(0, 1), slice(0, 2), slice(0, 1), *sides, (rows,), (columns,), band)


class Asked:
    """Even sums of positions, or by what ``settled`` says of a block: the blocks that were asked for are kept."""

    def __init__(self, settled):
        self.settled, self.pairs = settled, []

    def interval(self, q_range, k_range):
        return self.settled(q_range, k_range)

    def __call__(self, q_positions, k_positions):
        self.pairs += [(int(i), int(j)) for i in q_positions.ravel() for j in k_positions.ravel()]
        return (q_positions + k_positions) % 2 == 0


def pairs_of(tile, mask):
    """How often each pair of positions is visible in the parts of a tile."""
    found = {}
    for part, asked in positions.blocks(tile, mask):
        ((rows,), (columns,)) = part.row_positions, part.column_positions
        assert (part.rows.stop - part.rows.start, part.columns.stop - part.columns.start) == (len(rows), len(columns))
        answer = np.ones((1, 1, 1, 1), bool)
        if asked:
            answer = positions.shown(mask, part, np.zeros((1, 2, 1, 1)), 1, 2)
        answer = np.broadcast_to(answer, (1, 1, len(rows), len(columns)))[0, 0]
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                inside = (part.band.lo is None or j - i >= part.band.lo) and (
                    part.band.hi is None or j - i <= part.band.hi
                )
                if inside and answer[i, j]:
                    found[row, column] = found.get((row, column), 0) + 1
    return found


def settled_by_thirds(q_range, k_range):
    return [None, True, False][(q_range[0] // 4 + k_range[0] // 4) % 3]


@pytest.mark.parametrize("settled", [lambda q, k: None, lambda q, k: True, settled_by_thirds])
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(("rows", "columns"), [(range(5, 22), range(2, 21)), (range(1, 40, 3), range(0, 30, 3))])
def test_each_visible_pair_is_in_one_block(monkeypatch, rows, columns, band, settled):
    monkeypatch.setattr(positions, "SIDE", 4)
    tile, mask = tile_of(rows, columns, band), Asked(settled)
    due = {}
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if (band.lo is not None and j - i < band.lo) or (band.hi is not None and j - i > band.hi):
                continue
            block = rows[i - i % 4 : i - i % 4 + 4], columns[j - j % 4 : j - j % 4 + 4]
            says = settled(*block)
            if says or (says is None and (row + column) % 2 == 0):
                due[row, column] = 1
    assert pairs_of(tile, mask) == due


def test_settled_blocks_are_not_asked_for_and_lie_together(monkeypatch):
    monkeypatch.setattr(positions, "SIDE", 4)
    mask = Asked(lambda q_range, k_range: k_range[-1] < 12 or (None if k_range[0] < 16 else False))
    parts = list(positions.blocks(tile_of(range(8), range(24), Band()), mask))
    assert [(part.rows, part.columns, asked) for part, asked in parts] == [
        (slice(0, 4, 1), slice(0, 12, 1), False), (slice(0, 4, 1), slice(12, 16, 1), True),
        (slice(4, 8, 1), slice(0, 12, 1), False), (slice(4, 8, 1), slice(12, 16, 1), True),
    ]  # fmt: skip
    assert not mask.pairs


def test_an_interval_may_answer_in_numpys_bool(monkeypatch):
    monkeypatch.setattr(positions, "SIDE", 4)
    mask = Asked(lambda q_range, k_range: np.bool_(k_range[0] < 4))
    assert [part.columns for part, _ in positions.blocks(tile_of(range(4), range(8), Band()), mask)] == [slice(0, 4, 1)]


def test_an_answer_for_batch_entries_and_heads_is_cut_to_the_tile():
    def mask(q_positions, k_positions):
        answer = np.zeros((3, 4, q_positions.shape[0], k_positions.shape[1]), bool)
        answer[1, 2:] = True
        return answer

    tile = Tile(slice(1, 2), slice(2, 4), slice(1, 2), slice(0, 2), slice(0, 3), (range(2),), (range(3),))
    found = positions.shown(mask, tile, np.zeros((3, 4, 2, 1)), 3, 4)
    assert found.shape == (1, 2, 2, 3)
    assert found.all()


@pytest.mark.parametrize("band", BANDS)
def test_bounded_parts_cover_the_band_and_hold_few_numbers(monkeypatch, band):
    monkeypatch.setattr(positions, "NUMBERS", 3 * 20**2)
    tile, found = tile_of(range(45), range(70), band), {}
    for part in positions.bounded(tile, 3):
        assert part.height <= 20
        assert part.width <= 20
        ((rows,), (columns,)) = part.row_positions, part.column_positions
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if (part.band.lo is None or j - i >= part.band.lo) and (part.band.hi is None or j - i <= part.band.hi):
                    found[row, column] = found.get((row, column), 0) + 1
    lo, hi = (-100 if band.lo is None else band.lo), (100 if band.hi is None else band.hi)
    assert found == {(i, j): 1 for i in range(45) for j in range(70) if lo <= j - i <= hi}


def test_alibi_far_from_the_first_position_is_exact():
    rows, columns = range(90_000_000, 90_000_004), range(90_000_001, 90_000_003)
    tile = Tile(slice(0, 1), slice(1, 3), slice(0, 1), slice(0, 4), slice(0, 2), (rows,), (columns,))
    slopes = np.array([1.0, 0.5, -2.0, 4.0], np.float32)
    found = positions.alibi_of(slopes, tile, np.dtype(np.float32))
    due = -slopes[1:3, None, None] * np.abs(np.array(rows)[:, None] - np.array(columns))
    assert found.dtype == np.float32
    assert (found == due[None]).all()


def test_alibi_is_small_also_where_an_interval_joined_blocks(monkeypatch):
    monkeypatch.setattr(positions, "SIDE", 16)
    monkeypatch.setattr(positions, "NUMBERS", 2 * 16**2)
    made = []
    monkeypatch.setattr(forward_work, "alibi_of", lambda *given: made.append(positions.alibi_of(*given)) or made[-1])
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((1, 2, 200, 4)) for _ in range(3))
    slopes, everything = np.array([0.1, 0.3]), Asked(lambda q_range, k_range: True)
    found = ringcore.ring_attention(q, k, v, alibi=slopes, mask=everything, ring_size=2)
    assert max(x.size for x in made) <= 2 * 16**2
    np.testing.assert_allclose(found, ringcore.ring_attention(q, k, v, alibi=slopes), atol=1e-12)
