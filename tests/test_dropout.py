"""Dropout: rates, independence of pairs, and what does not know of it."""

from __future__ import annotations

import numpy as np
import pytest

import ringcore
from ringcore.dropout import kept_weights
from ringcore.values import Score, Tile


def drawn(rate, seed=0, rows=range(400), columns=range(300), batch=1, heads=2):
    sides = (slice(0, len(side)) for side in (rows, columns))
    tile = Tile(slice(0, batch), slice(0, heads), slice(0, heads), *sides, (rows,), (columns,))
    return kept_weights(Score(1.0, None, rate, seed), tile, np.zeros(()), np.dtype(np.float64))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_so_many_weights_are_dropped_as_the_rate_says(rate):
    found = drawn(rate)
    assert set(np.unique(found)) == {0.0, 1 / (1 - rate)}
    error = np.sqrt(rate * (1 - rate) / found.size)
    assert abs((found == 0).mean() - rate) < 5 * error
    for axis in (-1, -2):  # no row and no column is better off
        share = (found == 0).mean(axis)
        length = found.shape[axis]
        assert np.abs(share - rate).max() < 6 * np.sqrt(rate * (1 - rate) / length)


def test_neighbours_are_independent():
    signs = np.where(drawn(0.5, rows=range(5000, 5512), columns=range(5000, 5512)) == 0, -1.0, 1.0)[0]
    rows = signs.reshape(-1, 512)
    for shift in (1, 2, 3, 16, 256):
        assert abs((rows[:, shift:] * rows[:, :-shift]).mean()) < 0.01
        assert abs((signs[:, shift:] * signs[:, :-shift]).mean()) < 0.01
    assert abs((signs[0] * signs[1]).mean()) < 0.01  # of heads
    assert np.abs(np.corrcoef(rows[:200]) - np.eye(200)).max() < 0.3
    # Two rows that begin alike, in four corners of a rectangle: parity would show rows and keys merely added.
    corners = signs[0, :-1, :-1] * signs[0, 1:, :-1] * signs[0, :-1, 1:] * signs[0, 1:, 1:]
    assert abs(corners.mean()) < 0.01


def test_seeds_and_positions_decide():
    base = drawn(0.5)
    assert (base == drawn(0.5)).all()
    assert not (base == drawn(0.5, seed=1)).all()
    assert not (base == drawn(0.5, seed=1 << 32)).all()
    far = drawn(0.5, rows=range(1 << 40, (1 << 40) + 400))
    assert 0.4 < (base == far).mean() < 0.6
    part = drawn(0.5, rows=range(100, 200, 3), columns=range(7, 300, 2))
    assert (part == base[:, :, 100:200:3, 7::2]).all()


def test_every_key_in_turn_is_kept_on_average():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 6, 4)) for _ in range(3))
    due = ringcore.ring_attention(q, k, v)
    runs = [ringcore.ring_attention(q, k, v, dropout=0.25, dropout_seed=seed) for seed in range(1500)]
    assert np.abs(np.mean(runs, axis=0) - due).max() < 0.08
    assert not (runs[0] == runs[1]).all()


def test_lse_knows_nothing_of_dropout_and_a_rate_of_0_drops_nothing():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 2, 9, 4)) for _ in range(3))
    out, lse = ringcore.ring_attention(q, k, v, causal=True, return_lse=True, kernels="reference")
    dropped, same = ringcore.ring_attention(q, k, v, causal=True, return_lse=True, dropout=0.4, dropout_seed=3)
    assert (lse == same).all()
    assert not np.allclose(out, dropped)
    for seed in (None, 3):
        still = ringcore.ring_attention(q, k, v, causal=True, dropout=0.0, dropout_seed=seed, kernels="reference")
        assert (out == still).all()


def test_kernels_that_cannot_drop_are_passed_over_and_say_so():
    x = np.zeros((1, 1, 4, 4))
    found = ringcore.explain(x, x, x, dropout=0.1, dropout_seed=1)
    assert found.kernels == "reference"
    assert "numpy: they have no dropout" in found.passed
    assert "costs    dropout: no library's fused kernel draws it" in str(found)
    with pytest.raises(ringcore.UnsupportedError, match="they have no dropout"):
        ringcore.ring_attention(x, x, x, dropout=0.1, dropout_seed=1, kernels="numpy")
