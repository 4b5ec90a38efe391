"""How far a result may be from the dense float64 truth, and why."""

from __future__ import annotations

# Per dtype: out relative to the largest |v| that a row sees, and gradients relative to their largest entry.
# float64: rounding of sums of a few dozen terms. float32: 2e-6 up to logits of 16, beyond which the rounding of the
# logit itself grows with it. Half types: the rounding of the result, 2^-11 and 2^-8, of inputs that are exact.
OUT = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
GRADIENT = {"float64": 1e-10, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def logit_factor(largest_logit: float) -> float:
    """Rounding of the logits dominates once they are large."""
    return max(1.0, largest_logit / 16)
