"""DilatedAttention of torchscale, in the wheel of torchscale-gml: audit with --length 24, alone or by torchrun."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torchscale.component.multihead_attention as theirs

sys.path.append(str(Path(__file__).parent / "standins"))

from dense import dense

ACCEPTS = ("causal", "dilated")
LIBRARY = "torch"

# The package takes flash_attn if there is a GPU. all_gather_func makes its arrays on the current one: here, the CPU.
theirs.flash_attn_func = lambda q, k, v, dropout, bias, scale, causal: dense(q, k, v, causal, scale)
torch.cuda.current_device = lambda: "cpu"


def attention(function, q, k, v, *, ring_size, segment_lengths=None, dilation_rates=None, causal=False, **joined):
    _, heads, length, width = q.shape
    args = SimpleNamespace(
        multiway=False, xpos_rel_pos=False, flash_attention=True, seq_parallel=bool(joined),
        segment_length=list(segment_lengths or [length * ring_size]), dilated_ratio=list(dilation_rates or [1]),
    )  # fmt: skip
    module = function(args, heads * width, heads, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):  # the core alone is asked
        setattr(module, name, torch.nn.Identity())
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    return module(q, k, v, is_causal=causal)[0].unflatten(2, (heads, width)).transpose(1, 2)
