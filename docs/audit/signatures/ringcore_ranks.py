"""ringcore by zigzag, a process for each rank: audit ringcore:ring_attention with --layout zigzag and a launcher."""

ACCEPTS = (
    "causal", "grouped", "window", "scale", "softcap", "mask", "bias", "documents", "key_lengths", "sinks", "alibi",
    "prefix",
)  # fmt: skip
LIBRARY = "numpy"


def attention(function, q, k, v, *, ring_size, ring, **keywords):
    return function(q, k, v, ring=ring, layout="zigzag", **keywords)
