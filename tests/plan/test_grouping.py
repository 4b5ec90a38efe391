"""Tiles that became parts of one: the same pairs, and few launches for many documents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringcore
from ringcore import Band, Partial, Tile
from ringcore.grouping import grouped
from ringcore.tile import ReferenceKernels


def tile(rows, columns, band=None, batch=slice(0, 1)):
    sides = (slice(side.start, side.stop, 1) for side in (rows, columns))
    band = (Band() if band is None else band).clipped(len(rows), len(columns))
    return Tile(batch, slice(0, 2), slice(0, 1), *sides, (rows,), (columns,), band)


def pairs(tile):
    if tile.parts:
        found = [pair for part in tile.parts for pair in pairs(part)]
        for part in tile.parts:  # the common band says of each part what its own does
            band = tile.band.shifted(-part.height, -part.width).clipped(part.height, part.width)
            assert band == part.band
            assert tile.rows.start <= part.rows.start < part.rows.stop <= tile.rows.stop
        return found
    lo, hi = (-1000 if tile.band.lo is None else tile.band.lo), (1000 if tile.band.hi is None else tile.band.hi)
    rows, columns = range(tile.rows.start, tile.rows.stop), range(tile.columns.start, tile.columns.stop)
    return [(i, j) for a, i in enumerate(rows) for b, j in enumerate(columns) if lo <= b - a <= hi]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
                min_size=1, max_size=8))  # fmt: skip
def test_no_pair_is_lost_or_won(sizes):
    tiles, i, j = [], 0, 0
    for height, width, above, left, kind in sizes:
        i, j = i + above, j + left
        band = [Band(), Band(None, width - height), Band(None, 0)][kind]
        tiles.append(tile(range(i, i + height), range(j, j + width), band))
        i, j = i + height, j + width
    tiles = [x for x in tiles if pairs(x)]
    found = grouped(reversed(tiles))
    assert sorted(pair for x in found for pair in pairs(x)) == sorted(pair for x in tiles for pair in pairs(x))
    for x in found:
        for before, after in zip(x.parts, x.parts[1:], strict=False):
            assert before.rows.stop <= after.rows.start
            assert before.columns.stop <= after.columns.start


def test_causal_documents_are_one_launch():
    squares = [tile(range(a, b), range(a, b), Band(None, 0)) for a, b in ((0, 1), (1, 6), (6, 7), (9, 20))]
    (one,) = grouped(squares)
    assert len(one.parts) == 4
    assert one.band == Band(None, 0)
    assert (one.rows, one.columns) == (slice(0, 20, 1), slice(0, 20, 1))


def test_what_overlaps_differs_or_jumps_is_not_one():
    wide = tile(range(0, 4), range(0, 8))
    assert len(grouped([wide, tile(range(2, 6), range(8, 10))])) == 2  # rows of both
    assert len(grouped([wide, tile(range(4, 6), range(4, 10))])) == 2  # keys of both
    assert len(grouped([wide, tile(range(4, 8), range(8, 12), Band(None, 0))])) == 2  # another band
    assert len(grouped([wide, tile(range(4, 8), range(8, 12), batch=slice(1, 2))])) == 2
    strided = Tile(slice(0, 1), slice(0, 2), slice(0, 1), slice(4, 7, 2), slice(8, 11, 2), (range(2),), (range(2),))
    assert len(grouped([wide, strided])) == 2
    for start, parts in ((8, 1), (9, 2)):  # every second row: from an even one on, or from an odd one
        after = replace(strided, rows=slice(start, start + 3, 2), columns=slice(start + 4, start + 7, 2))
        assert len(grouped([strided, after])) == parts
    (one,) = grouped([strided, replace(strided, rows=slice(10, 13, 2), columns=slice(12, 15, 2))])
    assert [(rows, columns) for _, rows, columns in one.places()] == [
        (slice(0, 2), slice(0, 2)),
        (slice(3, 5), slice(2, 4)),
    ]


class InParts:
    """Fused kernels that take parts: the reference's, part by part. ``launches`` counts calls."""

    def __init__(self):
        self.reference = ReferenceKernels()
        self.capabilities = ringcore.Capabilities(
            "in parts", fused=True, bands="windows", parts=True, bias_gradient=False
        )
        self.launches = 0

    def parts(self, tile):
        yield from tile.places() if tile.parts else [(tile, slice(None), slice(None))]

    def forward(self, q, k, v, *, score, tile, **terms):
        self.launches += 1
        part = ringcore.empty_partial(q, v.shape[3])
        out, lse = part.out, part.lse
        for piece, rows, keys in self.parts(tile):
            found = self.reference.forward(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], score=score, tile=piece, **terms
            )
            out[:, :, rows], lse[:, :, rows] = found.out, found.lse
        return Partial.from_lse(out.astype(q.dtype), lse)

    def backward(self, dout, q, k, v, maximum, total, delta, *, score, tile, into, out, lse, dlse, **terms):
        self.launches += 1
        delta = (out * dout).sum(-1) - (0 if dlse is None else dlse)
        sums = [np.zeros(x.shape, x.dtype) for x in (q, k, v)]
        for piece, rows, keys in self.parts(tile):
            own = [x[:, :, side] for x, side in zip(sums, (rows, keys, keys), strict=True)]
            self.reference.backward(
                dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], maximum[:, :, rows], total[:, :, rows],
                delta[:, :, rows], score=score, tile=piece, into=ringcore.Gradients(*own), **terms,
            )  # fmt: skip
        return ringcore.Gradients(*sums)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_many_documents_in_few_launches(size, layout, batch):
    rng = np.random.default_rng(2)
    ends = [0, *np.cumsum(rng.integers(1, 9, 20)).tolist()]
    q, k, v, dout = (rng.standard_normal((batch, 2, ends[-1], 4)) for _ in range(4))
    keywords = {"causal": True, "cu_seqlens": ends, "wrt": ("q", "k", "v")}
    if layout == "balanced":
        layout = ringcore.balanced(ends[-1], size, causal=True, cu_seqlens=ends)
    (out, lse), pullback = ringcore.ring_attention_vjp(q, k, v, kernels="reference", **keywords)
    kernels = InParts()
    (came, came_lse), other = ringcore.ring_attention_vjp(
        q, k, v, kernels=kernels, ring_size=size, layout=layout, **keywords
    )
    tried = kernels.launches
    np.testing.assert_allclose(came, out, atol=1e-12)
    np.testing.assert_allclose(came_lse, lse, atol=1e-12)
    for x, y in zip(other(dout), pullback(dout), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)
    assert kernels.launches - tried <= size * (2 * size + 1)  # of 20 documents and more pieces
