"""ringcore by zigzag over NCCL, a GPU for each rank: audit ringcore:ring_attention with torchrun and --device cuda."""

from functools import cache

from ringcore_ranks import ACCEPTS

from ringcore_torch import TorchTransport

__all__ = ["ACCEPTS", "LIBRARY", "attention"]

LIBRARY = "torch"


@cache
def over(group):
    return TorchTransport(group, carrier="nccl")


def attention(function, q, k, v, *, ring_size, ring, **keywords):
    return function(q, k, v, ring=over(ring), layout="zigzag", **keywords)
