"""The two things that the array API standard leaves to each library: writing a part, and adding to it."""

from __future__ import annotations

from typing import Any

from ringcore.values import Array, Tile


def put(array: Array, index: tuple[Any, ...], value: Array) -> Array:
    """``array`` with ``value`` at ``index``, in place where the library allows it."""
    if hasattr(array, "at"):  # JAX arrays never change
        return array.at[index].set(value)
    array[index] = value
    return array


def add(array: Array, index: tuple[Any, ...], value: Array) -> Array:
    """``array`` with ``value`` added at ``index``, in place where the library allows it."""
    if hasattr(array, "at"):
        return array.at[index].add(value)
    array[index] += value
    return array


def slice_of(positions: range) -> slice:
    """The slice that picks these positions; its end is within the array, as the standard demands."""
    if len(positions) < 2:  # whose step may be larger than a library takes
        return slice(positions[0], positions[0] + 1, 1) if positions else slice(0, 0)
    return slice(positions[0], positions[-1] + 1, positions.step)


def row_index(tile: Tile) -> tuple[Any, ...]:
    """Where the tile's queries lie in q, out and lse."""
    return tile.batch, tile.q_heads, tile.rows, ...


def key_index(tile: Tile) -> tuple[Any, ...]:
    """Where the tile's keys lie in the visiting k and v."""
    return tile.batch, tile.k_heads, tile.columns, ...


def term_index(term: Array, tile: Tile) -> tuple[slice, ...]:
    """Where the tile lies in a bias or mask [B, H, S, N] of local rows and global columns; axes of 1 are kept whole.

    Such tiles hold one range of columns, so that a slice names them.
    """
    (columns,) = tile.column_positions
    wanted = (tile.batch, tile.q_heads, tile.rows, slice_of(columns))
    return tuple(slice(0, 1) if length == 1 else part for length, part in zip(term.shape, wanted, strict=True))
