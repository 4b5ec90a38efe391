"""DilatedAttention of dilated-attention-pytorch (fkodom): audit with --length 24. Beside it a stand-in for xformers."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "standins"))

ACCEPTS = ("causal", "dilated")
LIBRARY = "torch"


def attention(function, q, k, v, *, ring_size, segment_lengths=None, dilation_rates=None, causal=False):
    # Whole attention is asked of two equal branches: it shares heads out among branches, and one branch that takes all
    # rows and heads adds to a view of everything, which autograd refuses.
    module = function(list(segment_lengths or [q.shape[2]] * 2), list(dilation_rates or [1, 1]))
    return module(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)
