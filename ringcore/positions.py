"""Terms of positions, made for one block of a tile after the other: masks that are asked, and ALiBi."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isqrt
from typing import Any

import array_api_compat

from ringcore.errors import DeviceError, DtypeError, ShapeError
from ringcore.partial import dtype_name
from ringcore.values import NOTHING, Array, Tile, namespace

Mask = Callable[[Array, Array], Array]
"""``mask(q_positions, k_positions)``: for positions [s, 1] and [1, t] what a query may attend, see `shown`."""

SIDE = 1024
"""Rows and keys of a block that a mask is asked for."""

NUMBERS = 1 << 22
"""The most numbers of ALiBi that are made at once, over all heads."""


def blocks(tile: Tile, mask: Mask) -> Iterator[tuple[Tile, bool]]:
    """The parts of a tile, of one range of rows and one of columns, that may hold pairs that the mask shows.

    With each comes whether the mask must be asked for its pairs. ``mask.interval(q_positions, k_positions)``, if there
    is one, says True or False of two ranges of positions where it shows all of their pairs or none, and None elsewhere.
    """
    interval = getattr(mask, "interval", None)
    for rows in _spans(tile.height, SIDE):
        whole: tuple[int, int] | None = None  # columns of blocks side by side that are shown wholly
        for columns in _spans(tile.width, SIDE):
            part = _part(tile, rows, columns)
            if part is None:
                continue
            ((q_positions,), (k_positions,)) = part.row_positions, part.column_positions
            answer = None if interval is None else interval(q_positions, k_positions)
            if answer is not None and answer:
                whole = (whole or columns)[0], columns[1]
                continue
            if whole is not None:
                yield from _shown_wholly(tile, rows, whole)
                whole = None
            if answer is None:
                yield part, True
        if whole is not None:
            yield from _shown_wholly(tile, rows, whole)


def shown(mask: Mask, tile: Tile, like: Array, batch: int, heads: int) -> Array:
    """What the mask says of a tile of one range of rows and one of columns, [B or 1, H or 1, s or 1, t or 1].

    like: an array of the library and on the device that the mask's positions, int64, are of, and its answer must be.
    batch, heads: of the whole call. The answer is bool and broadcasts to [B, H, s, t].
    Raises DtypeError, ShapeError or DeviceError for any other answer.
    """
    xp, device = namespace(like), array_api_compat.device(like)
    ((rows,), (columns,)) = tile.row_positions, tile.column_positions
    q_positions, k_positions = (
        xp.arange(places.start, places.stop, places.step, dtype=xp.int64, device=device) for places in (rows, columns)
    )
    answer = mask(q_positions[:, None], k_positions[None, :])
    _check(answer, like, (batch, heads, len(rows), len(columns)))
    answer = xp.reshape(answer, (1,) * (4 - answer.ndim) + tuple(answer.shape))
    leading = zip(answer.shape, (tile.batch, tile.q_heads), strict=False)
    return answer[*(slice(0, 1) if length == 1 else part for length, part in leading), ...]


class OfHeads:
    """A mask of positions for some of the heads that it knows of.

    heads: which of how many.
    """

    def __init__(self, mask: Mask, heads: slice, count: int) -> None:
        self._mask, self._heads, self._count = mask, heads, count
        self.interval = getattr(mask, "interval", None)

    def __call__(self, q_positions: Array, k_positions: Array) -> Array:
        """What the mask says, of these heads alone."""
        answer = self._mask(q_positions, k_positions)
        alike = answer.ndim < 3 or answer.shape[-3] != self._count
        return answer if alike else answer[..., self._heads, :, :]


def bounded(tile: Tile, heads: int) -> Iterator[Tile]:
    """The parts of a tile that its band shows, of no more than NUMBERS pairs over so many heads."""
    side = max(16, isqrt(NUMBERS // heads))
    for rows in _spans(tile.height, side):
        for columns in _spans(tile.width, side):
            part = _part(tile, rows, columns)
            if part is not None:
                yield part


def alibi_of(slopes: Array, tile: Tile, dtype: Any) -> Array:
    """-slope * |q position - k position| [1, H, s, t] of a tile of one range of rows and one of columns.

    slopes: [H], of the whole call. Source: Press, Smith and Lewis 2021, arXiv:2108.12409, for both directions.
    """
    xp, device = namespace(slopes), array_api_compat.device(slopes)
    ((rows,), (columns,)) = tile.row_positions, tile.column_positions
    # Distances are made of integers, so that they are exact however far the positions are from 0.
    i, j = (
        xp.arange(places.start, places.stop, places.step, dtype=xp.int64, device=device) for places in (rows, columns)
    )
    distance = xp.astype(xp.abs(i[:, None] - j[None, :]), dtype)
    return -(xp.astype(slopes[tile.q_heads], dtype)[None, :, None, None] * distance)


def _check(answer: Any, like: Array, due: tuple[int, int, int, int]) -> None:
    if not array_api_compat.is_array_api_obj(answer) or namespace(answer) is not namespace(like):
        raise DtypeError(
            f"mask, a function of positions, gave a {type(answer).__name__}; it must give an array of the library of "
            "its positions."
        )
    if dtype_name(answer) != "bool":
        raise DtypeError(
            f"mask, a function of positions, gave {dtype_name(answer)}; it must give bool, True = may attend."
        )
    if str(array_api_compat.device(answer)) != str(array_api_compat.device(like)):
        raise DeviceError(
            f"mask, a function of positions, gave an array on {array_api_compat.device(answer)}; it must be where its "
            f"positions are, {array_api_compat.device(like)}."
        )
    came = (1,) * (4 - answer.ndim) + tuple(answer.shape)
    if len(came) > 4 or any(length not in (1, whole) for length, whole in zip(came, due, strict=True)):
        raise ShapeError(
            f"mask, a function of positions, gave shape {tuple(answer.shape)} for {due[2]} queries and {due[3]} keys; "
            f"it must broadcast to [B, H, s, t], {due}."
        )


def _shown_wholly(tile: Tile, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[tuple[Tile, bool]]:
    part = _part(tile, rows, columns)
    if part is not None:
        yield part, False


def _part(tile: Tile, rows: tuple[int, int], columns: tuple[int, int]) -> Tile | None:
    """The part of a tile, or None if its band hides it."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    band = tile.band.shifted(rows[0], columns[0]).clipped(height, width)
    return None if band == NOTHING else tile.part(rows, columns, band)


def _spans(length: int, side: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, side):
        yield start, min(length, start + side)
