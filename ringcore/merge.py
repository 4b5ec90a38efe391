"""The merge of partial results: the algebra that everything else stands on."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat

from ringcore.arrays import put
from ringcore.errors import DeviceError, KeywordError, ShapeError
from ringcore.partial import Partial, accumulation_dtype
from ringcore.values import Array, Score, namespace


def merge(first: Partial, second: Partial) -> Partial:
    """Combine attention over two disjoint sets of keys.

    Shapes: ``weighted`` [B, H, S, E], ``maximum`` and ``total`` [B, H, S], equal in both.
    Dtypes: real floating; the result has the wider accumulation dtype.
    Units: ``maximum`` is a score (natural-log scale); -inf means that no key was seen.
    Law: commutative, associative up to rounding; an empty partial changes nothing, bit for bit.

    Raises ShapeError if the shapes differ, DeviceError for arrays of different libraries, KeywordError for what is no
    partial and for scores that are known to be made in different ways.
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, section 3.
    """
    for place, given in (("first", first), ("second", second)):
        if not isinstance(given, Partial):
            raise KeywordError(f"{place} is a {type(given).__name__}; it must be a ringcore.Partial.")
    for name in ("weighted", "maximum", "total"):
        came, due = getattr(second, name).shape, getattr(first, name).shape
        if tuple(came) != tuple(due):
            raise ShapeError(
                f"{name} has shape {tuple(due)} in the first partial and {tuple(came)} in the second. "
                "Merge partials of the same queries."
            )
    score = common_score(first, second.score)
    try:
        xp = namespace(first.weighted, second.weighted)
    except TypeError as error:
        raise DeviceError(
            f"the partials do not hold arrays of one library: {error}. Convert one of them first."
        ) from error
    wide = _wider(xp, first.maximum.dtype, second.maximum.dtype)
    first, second = _canonical(xp, first, wide), _canonical(xp, second, wide)
    maximum = xp.maximum(first.maximum, second.maximum)
    # Where neither saw a key, -inf - -inf would be NaN.
    reference = xp.where(maximum == -math.inf, 0.0, maximum)
    first_factor = xp.exp(first.maximum - reference)
    second_factor = xp.exp(second.maximum - reference)

    def select(
        first_value: Array, second_value: Array, combined: Array, first_seen: Array, second_seen: Array
    ) -> Array:
        return xp.where(second_seen, xp.where(first_seen, combined, second_value), first_value)

    seen = first.seen, second.seen
    return Partial(
        select(
            first.weighted,
            second.weighted,
            first.weighted * first_factor[..., None] + second.weighted * second_factor[..., None],
            seen[0][..., None],
            seen[1][..., None],
        ),
        maximum,
        select(first.total, second.total, first.total * first_factor + second.total * second_factor, *seen),
        score,
    )


def common_score(partial: Partial, score: Score | None) -> Score | None:
    """What made the scores of the partial and of others; raises KeywordError if it is known not to be one thing."""
    own = partial.score
    if own is not None and score is not None and (own.scale, own.softcap) != (score.scale, score.softcap):
        raise KeywordError(
            f"the scores of one partial were made with scale {own.scale} and softcap {own.softcap}, those of the other "
            f"with scale {score.scale} and softcap {score.softcap}: they are of different softmaxes."
        )
    return own or score


def merge_rows(state: Partial, rows: tuple[Any, ...], part: Partial) -> Partial:
    """``state`` with ``part`` merged into its rows at the index ``rows``, in place where the library allows it."""
    state = state.widened
    merged = merge(Partial(*(x[rows] for x in fields(state))), part)
    return Partial(*(put(x, rows, new) for x, new in zip(fields(state), fields(merged), strict=True)))


def finished(
    partial: Partial, dtype: Any, last: tuple[tuple[Any, ...], Partial] | None = None
) -> tuple[Array, Array, Array]:
    """out in ``dtype``, maximum and total, of ``partial`` with ``last`` merged in: an index of rows, and their partial.

    The buffers of ``partial`` are used up.
    """
    if last is not None:
        partial = merge_rows(partial, *last)
    xp, out = namespace(partial.weighted), partial.weighted
    if out.dtype == partial.total.dtype:  # else a fused kernel's, untouched: each total is 1, or 0 over a row of 0
        out /= xp.where(partial.seen, partial.total, 1.0)[..., None]
    return xp.astype(out, dtype, copy=False), partial.maximum, partial.total


def finished_lse(maximum: Array, total: Array, empty: float) -> Array:
    """maximum + log(total) [B, H, S]; ``empty`` in rows that saw no key."""
    xp = namespace(maximum)
    seen = (maximum != -math.inf) & (total != 0)
    return xp.where(seen, maximum + xp.log(xp.where(seen, total, 1.0)), empty)


class StandardArithmetic:
    """How partials of any library are merged and finished; see `ringcore.protocols.Arithmetic`."""

    merge_rows = staticmethod(merge_rows)
    finished = staticmethod(finished)
    finished_lse = staticmethod(finished_lse)


def fields(partial: Partial) -> tuple[Array, Array, Array]:
    """weighted, maximum and total."""
    return partial.weighted, partial.maximum, partial.total


def empty_partial(q: Array, value_dim: int) -> Partial:
    """The partial of queries ``q`` [B, H, S, D] that have seen no key: the identity of `merge`.

    ``weighted`` is [B, H, S, value_dim]; the dtype is q's accumulation dtype, the device q's.
    """
    xp = namespace(q)
    dtype, device = accumulation_dtype(q), array_api_compat.device(q)
    rows = tuple(q.shape[:-1])
    return Partial(
        xp.zeros((*rows, value_dim), dtype=dtype, device=device),
        xp.full(rows, -math.inf, dtype=dtype, device=device),
        xp.zeros(rows, dtype=dtype, device=device),
    )


def _canonical(xp: Array, partial: Partial, dtype: Array) -> Partial:
    """The partial in ``dtype`` with (0, -inf, 0) in rows that saw nothing, whatever they held."""
    seen = partial.seen
    return Partial(
        xp.where(seen[..., None], xp.astype(partial.weighted, dtype), 0.0),
        xp.where(seen, xp.astype(partial.maximum, dtype), -math.inf),
        xp.where(seen, xp.astype(partial.total, dtype), 0.0),
    )


def _wider(xp: Array, *dtypes: Array) -> Array:
    return xp.float64 if any(dtype == xp.float64 for dtype in dtypes) else xp.float32
