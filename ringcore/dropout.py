"""Which weights dropout takes away: a function of seed, batch entry, head and positions alone, the same everywhere.

Numbers are words of 32 bits in int64: products are made of 16 bits at a time, because the array API standard leaves an
overflow undefined, and not every library multiplies unsigned words. Words are mixed as MurmurHash3 does it (Appleby,
public domain), rows first; each pair then costs three products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat

from ringcore.values import Array, Score, Tile, namespace

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0xCC9E2D51, 0x1B873593
_LAST, _LAST_BUT_ONE, _AGAIN = 0xC2B2AE35, 0x85EBCA6B, 0x9E3779B1


class Dropout(NamedTuple):
    """What decides about a tile's pairs, in numbers, for kernels that draw by themselves.

    seed: the word after both words of the seed, on which those of batch entry, head and row follow. least: the smallest
    word that stays. scale: what the weights that stay are multiplied with. The others are places: of the tile's first
    batch entry, head, row and key, and from one head, row or key to the next.
    """

    seed: int
    least: int
    scale: float
    batch: int
    head: int
    head_step: int
    row: int
    row_step: int
    key: int
    key_step: int

    @classmethod
    def of(cls, score: Score, tile: Tile) -> Dropout:
        """For a tile of one range of rows and one of columns."""
        ((rows,), (columns,)) = tile.row_positions, tile.column_positions
        seed = _absorbed(_absorbed(0, score.seed & _WORD), score.seed >> 32 & _WORD)
        least = min(_WORD, round(score.dropout * (_WORD + 1)))
        scale = 1.0 / (1.0 - score.dropout)
        heads = score.first_head + tile.q_heads.start, tile.q_heads.step or 1
        sides = rows.start, rows.step, columns.start, columns.step
        return cls(seed, least, scale, tile.batch.start, *heads, *sides)

    def corner(self, batch: int, row: int, key: int) -> Dropout:
        """The same for a part of the tile, from this batch entry, row and key on."""
        return self._replace(
            batch=self.batch + batch, row=self.row + row * self.row_step, key=self.key + key * self.key_step
        )


def kept_weights(score: Score, tile: Tile, like: Array, dtype: Any) -> Array:
    """What dropout multiplies the tile's weights [B, H, s, t] with: 0, or 1 / (1 - rate).

    tile: of one range of rows and one of columns. like: an array of the library and on the device to compute with.
    """
    xp, device = namespace(like), array_api_compat.device(like)

    def numbers(places: range, axis: int) -> Array:
        shape = [1] * 4
        shape[axis] = len(places)
        found = xp.arange(places.start, places.stop, places.step, dtype=xp.int64, device=device)
        return xp.reshape(found, tuple(shape))

    ((rows,), (columns,)) = tile.row_positions, tile.column_positions
    draw = Dropout.of(score, tile)
    heads = range(draw.head, draw.head + tile.heads * draw.head_step, draw.head_step)
    leading = range(tile.batch.start, tile.batch.stop, tile.batch.step or 1), heads
    of_row: Array | int = draw.seed
    for axis, places in enumerate((*leading, rows)):
        position = numbers(places, axis)
        of_row = _absorbed(_absorbed(of_row, position & _WORD), position >> 32 & _WORD)
    key = numbers(columns, 3)
    of_key = _absorbed(_absorbed(0, key & _WORD), key >> 32 & _WORD)
    of_row = _finished(of_row)
    pairs = _finished((of_row + of_key) & _WORD)
    pairs = _times(pairs ^ _times(of_row, _AGAIN), _LAST)
    drawn = pairs ^ (pairs >> 16)
    return xp.astype(drawn >= draw.least, dtype) * draw.scale


def _times(x: Any, factor: int) -> Any:
    """The low word of a product."""
    return ((((x >> 16) * factor & 0xFFFF) << 16) + (x & 0xFFFF) * factor) & _WORD


def _turned(x: Any, bits: int) -> Any:
    return ((x << bits) | (x >> (32 - bits))) & _WORD


def _absorbed(state: Any, word: Any) -> Any:
    state = state ^ _times(_turned(_times(word, _FIRST), 15), _SECOND)
    return (_turned(state, 13) * 5 + 0xE6546B64) & _WORD


def _finished(x: Any) -> Any:
    x = _times(x ^ (x >> 16), _LAST_BUT_ONE)
    x = _times(x ^ (x >> 13), _LAST)
    return x ^ (x >> 16)
