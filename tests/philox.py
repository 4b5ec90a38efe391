"""The numbers that `torch.randn` draws on a CUDA device, drawn with NumPy alone.

Source: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11), laid out
as PyTorch's `distribution_nullary_kernel` (aten/src/ATen/native/cuda/DistributionTemplates.h) and cuRAND's
`curand_normal4` do: thread t owns subsequence t, each draws one block of four numbers, and every call of `torch.randn`
moves the generator on by one block.
"""

import math

import numpy as np
from numpy.typing import NDArray

THREADS = 2**15  # one element per thread up to here; beyond it the layout depends on the GPU


def philox(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Ten rounds of Philox4x32 on counters of shape [4, n]; the words are 32 bits wide and kept in uint64."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = counter
    for turn in range(10):
        key0 = np.uint64(((seed & 0xFFFFFFFF) + turn * 0x9E3779B9) & 0xFFFFFFFF)
        key1 = np.uint64(((seed >> 32) + turn * 0xBB67AE85) & 0xFFFFFFFF)
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ key0, second & low, (first >> 32) ^ c3 ^ key1, first & low
    return np.stack([c0, c1, c2, c3])


def standard_normal(seed: int, shape: tuple[int, ...], call: int = 0) -> NDArray[np.float32]:
    """Draw what the `call`-th (from 0) `torch.randn(shape, device="cuda")` after `torch.manual_seed(seed)` draws.

    Every call since the seed must have been of at most `THREADS` elements. Values agree to float32 rounding.
    """
    count = math.prod(shape)
    if count > THREADS:
        raise ValueError(f"{count} elements: the layout of more than {THREADS} depends on the GPU")
    counter = np.zeros((4, count), np.uint64)
    counter[0] = call  # the generator's offset, in blocks of four
    counter[2] = np.arange(count)  # the subsequence: the thread
    word0, word1 = philox(counter, seed)[:2]
    radius = np.sqrt(-2 * np.log((word0 + 0.5) * 2.0**-32))  # Box-Muller; a thread's first number is the sine
    return (radius * np.sin(2 * np.pi * (word1 + 0.5) * 2.0**-32)).astype(np.float32).reshape(shape)
