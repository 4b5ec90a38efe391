"""A mask as what is added to the scores, and what follows from it for keys, rows and statistics."""

from __future__ import annotations

import math

import array_api_compat

from ringcore import Array, Partial
from ringcore_cudnn.arrays import Arrays

_FLOOR = -3.4e38  # above the lowest float32, below all scores of half types


def added(arrays: Arrays, q: Array, mask: Array, columns: int) -> Array:
    """0 where the mask shows, -inf where it hides, in q's dtype [B or 1, H or 1, S or 1, columns]."""
    xp, device = array_api_compat.array_namespace(q), array_api_compat.device(q)
    shown, hidden = (xp.full((), value, dtype=q.dtype, device=device) for value in (0.0, -math.inf))
    return arrays.where(xp.broadcast_to(mask, (*mask.shape[:3], columns)), shown, hidden)


def seen_alone(arrays: Arrays, mask: Array | None, *keys: Array) -> tuple[Array, ...]:
    """Arrays of keys [B, Hk, T, ...] with 0 in keys that no row sees: cuDNN multiplies what they hold by 0, NaN too."""
    if mask is None:
        return keys
    xp = array_api_compat.array_namespace(mask)
    # All heads of q together, for a head of k may serve several of them.
    seen = xp.any(mask, axis=(1, 2))
    return tuple(arrays.where(seen[:, None, :, None], x, xp.zeros_like(x)) for x in keys)


def normalised(arrays: Arrays, out: Array, lse: Array) -> Partial:
    """The partial of out [B, H, S, E] and lse [B, H, S] under a mask.

    Of a row that is hidden entirely cuDNN may say an lse of -inf or of the lowest float32, and anything in out.
    """
    xp = array_api_compat.array_namespace(lse)
    seen = ~(lse <= _FLOOR)  # NaN must show
    nothing = xp.zeros((), dtype=out.dtype, device=array_api_compat.device(out))
    out = arrays.where(seen[..., None], out, nothing)
    return Partial(out, xp.where(seen, lse, -math.inf), xp.astype(seen, lse.dtype))
