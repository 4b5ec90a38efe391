"""Bias and mask as what is added to the scores, and what follows from it for rows, keys and statistics."""

from __future__ import annotations

import math

import array_api_compat

from ringcore import Array, Partial

_FLOOR = -3.4e38  # between the lowest numbers of float32 and of the half types


def added(q: Array, bias: Array | None, mask: Array | None) -> Array | None:
    """What is added to the scores, -inf where the mask hides; its axes are of full length or 1. None for nothing.

    In q's dtype or in float32, which are the two that cuDNN adds.
    """
    if bias is None and mask is None:
        return None
    xp, device = array_api_compat.array_namespace(q), array_api_compat.device(q)
    if bias is None:
        bias = xp.zeros((), dtype=q.dtype, device=device)
    elif bias.dtype != q.dtype:
        bias = xp.astype(bias, xp.float32, copy=False)
    if mask is None:
        return bias
    return xp.where(mask, bias, xp.full((), -math.inf, dtype=bias.dtype, device=device))


def seen_alone(term: Array | None, *arrays: Array) -> tuple[Array, ...]:
    """Arrays of keys [B, Hk, T, ...] with 0 in keys that no row sees: cuDNN multiplies what they hold by 0, NaN too."""
    if term is None:
        return arrays
    xp = array_api_compat.array_namespace(term)
    # All heads of q together, for a head of k may serve several of them.
    unseen = xp.max(term, axis=(1, 2)) == -math.inf
    return tuple(xp.where(unseen[:, None, :, None], xp.zeros_like(x), x) for x in arrays)


def normalised(out: Array, lse: Array, term: Array) -> Partial:
    """The partial of a mask: out [B, H, S, E] stays in its half type, for lse has not lost the number of keys."""
    xp = array_api_compat.array_namespace(lse)
    seen = _seen(lse, term)
    return Partial(_kept(out, seen), xp.where(seen, lse, -math.inf), xp.astype(seen, lse.dtype))


def unnormalised(out: Array, maximum: Array, total: Array, term: Array) -> Partial:
    """The partial of a bias, whose scores may be so large that an lse would lose log(total)."""
    xp = array_api_compat.array_namespace(total)
    # The largest of scores that are all NaN is -inf on a GPU, but their total is NaN, and must show.
    unknown = total != total
    seen = (_seen(maximum, term) & (total != 0)) | unknown
    maximum = xp.where(seen, xp.where(unknown, total, maximum), -math.inf)
    total = xp.where(seen, total, 0.0)
    return Partial(_kept(out, seen) * total[..., None], maximum, total)


def _seen(reference: Array, term: Array) -> Array:
    """Which rows saw a key, by their maximum or their lse [B, H, S].

    Of a row that is hidden entirely cuDNN may say -inf, or the lowest float32. No score under a term in a half type is
    as low, but one under a term in float32 may be.
    """
    xp = array_api_compat.array_namespace(term)
    return ~(reference <= (-math.inf if term.dtype == xp.float32 else _FLOOR))


def _kept(out: Array, seen: Array) -> Array:
    """out with 0 in rows that saw no key, whatever it holds there."""
    xp = array_api_compat.array_namespace(out)
    nothing = xp.zeros((), dtype=out.dtype, device=array_api_compat.device(out))
    return xp.where(seen[..., None], out, nothing)


def rounding(lse: Array, maximum: Array, total: Array) -> Array:
    """exp(lse) / (exp(maximum) total) [B, H, S]: what each weight exp(s - lse) of a row is too large by, float32.

    An lse that is large has lost log(total), or some of it. 0 in rows without keys, where lse is +inf.
    """
    xp = array_api_compat.array_namespace(lse)
    return xp.where(lse == math.inf, xp.zeros_like(lse), xp.exp(lse - maximum) / total)


def corrected(gradient: Array, factor: Array) -> Array:
    """The gradient of out [B, H, S, E] or of lse [B, H, S] divided so that wrong weights count as they should.

    All that backward gives is a sum of weights times gradients of rows.
    """
    xp = array_api_compat.array_namespace(gradient)
    factor = factor[..., None] if gradient.ndim == 4 else factor
    return xp.astype(xp.astype(gradient, xp.float32, copy=False) * factor, gradient.dtype, copy=False)
