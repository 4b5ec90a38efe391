"""Splitting whole arrays into shards and putting them together again."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ringcore.arrays import put, slice_of
from ringcore.errors import DtypeError, LayoutError, ShapeError
from ringcore.layout import Layout, layout_of_lengths, resolve_layout
from ringcore.partial import dtype_name
from ringcore.values import Array, namespace


def shard(x: Array, layout: str | Layout, rank: int, size: int, axis: int = 2) -> Array:
    """Rank ``rank``'s rows of x, in the order in which the layout gives them.

    x: any array whose axis ``axis`` is the whole sequence. The result may be a view of x.
    Raises LayoutError if the layout does not fit x's length or ``size``, or if there is no such rank.
    """
    axis = _checked_axis(x, axis)
    xp = namespace(x)
    if not 0 <= rank < size:
        raise LayoutError(f"rank is {rank}, but the ring has {size} ranks: 0 to {size - 1}.")
    resolved = resolve_layout(layout, x.shape[axis], size, "x")
    before = (slice(None),) * axis
    parts = [x[(*before, slice_of(r), ...)] for r in resolved.shards[rank]]
    if len(parts) == 1:
        return parts[0]
    return xp.concat(parts, axis=axis) if parts else x[(*before, slice(0, 0), ...)]


def unshard(parts: Sequence[Array], layout: str | Layout, axis: int = 2) -> Array:
    """The whole array from every rank's shard, in the order of ranks: the inverse of `shard`.

    Raises LayoutError if the shards' lengths are not the layout's, ShapeError or DtypeError if the shards differ
    in anything else.
    """
    if len(parts) == 0:
        raise ShapeError("parts is empty; it must hold one shard for each rank.")
    axis = _checked_axis(parts[0], axis)
    for rank, part in enumerate(parts):
        _checked_axis(part, axis)
        came, due = ((*x.shape[:axis], *x.shape[axis + 1 :]) for x in (part, parts[0]))
        if came != due:
            raise ShapeError(
                f"the part of rank {rank} has shape {tuple(part.shape)}, that of rank 0 {tuple(parts[0].shape)}: they "
                f"may differ in axis {axis} alone."
            )
        if dtype_name(part) != dtype_name(parts[0]):
            raise DtypeError(
                f"the part of rank {rank} holds {dtype_name(part)}, that of rank 0 {dtype_name(parts[0])}."
            )
    xp = namespace(*parts)
    resolved = layout_of_lengths(layout, [part.shape[axis] for part in parts], "parts")
    if len(parts) == 1 and resolved.shards in (((range(resolved.length),),), ((),)):
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = resolved.length
    whole = xp.empty(tuple(shape), dtype=parts[0].dtype, device=array_api_compat.device(parts[0]))
    before = (slice(None),) * axis
    for part, held in zip(parts, resolved.shards, strict=True):
        row = 0
        for r in held:
            piece = part[(*before, slice(row, row := row + len(r)), ...)]
            whole = put(whole, (*before, slice_of(r), ...), piece)
    return whole


def _checked_axis(x: Array, axis: int) -> int:
    if not array_api_compat.is_array_api_obj(x):
        raise DtypeError(f"a {type(x).__name__} was given; it must be an array of NumPy, CuPy, Torch, JAX or the like.")
    if not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"axis is {axis}, but the array has {x.ndim} axes.")
    return int(axis % x.ndim)
