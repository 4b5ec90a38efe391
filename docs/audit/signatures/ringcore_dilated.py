"""ringcore's own dilated attention: audit ringcore:dilated_attention."""

ACCEPTS = "causal", "grouped", "scale", "softcap", "dilated"
LIBRARY = "torch"


def attention(function, q, k, v, *, segment_lengths=None, dilation_rates=None, **keywords):
    branches = {"segment_lengths": segment_lengths or [q.shape[2]], "dilation_rates": dilation_rates or [1]}
    return function(q, k, v, **branches, **keywords)
