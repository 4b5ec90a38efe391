"""ring_flash_attn of ring-attention-pytorch, striped: audit with --launcher torchrun and --layout striped.

One bucket in each shard: the package cuts stripes by buckets, and rank r then holds positions r, r + ranks, and so on.
Its order of grouped heads is h % Hk, also in its own reference, so query heads are put into that order and back.
"""

ACCEPTS = "causal", "grouped", "softcap"
LIBRARY = "torch"


def attention(function, q, k, v, *, ring_size, causal=False, softcap=None, **joined):
    heads, key_heads = q.shape[1], k.shape[1]
    q = q.unflatten(1, (key_heads, heads // key_heads)).transpose(1, 2).flatten(1, 2)
    clamped = {} if softcap is None else {"softclamp_qk_sim": True, "softclamp_value": softcap}
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    together = ring_size > 1
    out = function(
        q, k, v, causal=causal, bucket_size=k.shape[1], ring_reduce_col=together, striped_ring_attn=together, **clamped
    )
    return out.transpose(1, 2).unflatten(1, (heads // key_heads, key_heads)).transpose(1, 2).flatten(1, 2)
