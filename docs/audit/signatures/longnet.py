"""DilatedAttention of longnet (kyegomez), with FlashAttention of zetascale: audit with --length 24, one branch."""

import importlib.util
import sys
from types import ModuleType

import torch

# Of zetascale it takes one file; all that the folders above would import as well is left out.
place = importlib.util.find_spec("zeta").submodule_search_locations[0]
for name, folder in (("zeta", ""), ("zeta.nn", "/nn"), ("zeta.nn.attention", "/nn/attention")):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [place + folder]

ACCEPTS = ("causal",)  # it has one segment length and one rate, and no mixture
LIBRARY = "torch"


def attention(function, q, k, v, *, ring_size, causal=False):
    _, heads, length, width = q.shape
    dim = heads * width
    # It projects one x to q, k and v: x is all three beside one another, and each projection takes its own.
    module = function(3 * dim, heads, 1, length, causal=causal, dtype=q.dtype, device="cpu").to(q.dtype)
    for place, projection in enumerate((module.proj_q, module.proj_k, module.proj_v)):
        with torch.no_grad():
            projection.bias.zero_()
            projection.weight.zero_()
            # Its scale is of the width that it is told, here thrice that of q.
            eye = torch.eye(dim) * (3**0.5 if place == 0 else 1.0)
            projection.weight[:dim, place * dim : (place + 1) * dim] = eye
    x = torch.cat([each.transpose(1, 2).flatten(2) for each in (q, k, v)], -1)
    return module(x)[..., :dim].unflatten(2, (heads, width)).transpose(1, 2)
