"""Documents as they are packed for training."""

import math
import random


def log_normal_documents(seed, length=131_072):
    """Where documents of 64 to 32k positions end, in ``length`` of them: cu_seqlens."""
    rng, ends = random.Random(seed), [0]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + int(min(32768, max(64, math.exp(rng.gauss(7.0, 1.3)))))))
    return ends
