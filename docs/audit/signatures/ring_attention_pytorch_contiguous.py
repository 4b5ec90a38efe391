"""ring_flash_attn of ring-attention-pytorch: audit with --launcher torchrun and --layout contiguous.

Two buckets in each shard, as in the package's own tests. The ring is the default group: the package takes no other.
Its order of grouped heads is h % Hk, also in its own reference, so query heads are put into that order and back.
"""

ACCEPTS = "causal", "grouped", "softcap"
LIBRARY = "torch"
BUCKETS = 2


def attention(function, q, k, v, *, ring_size, causal=False, softcap=None, **joined):
    heads, key_heads = q.shape[1], k.shape[1]
    q = q.unflatten(1, (key_heads, heads // key_heads)).transpose(1, 2).flatten(1, 2)
    clamped = {} if softcap is None else {"softclamp_qk_sim": True, "softclamp_value": softcap}
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    bucket_size = max(1, k.shape[1] // BUCKETS)
    out = function(q, k, v, causal=causal, bucket_size=bucket_size, ring_reduce_col=ring_size > 1, **clamped)
    return out.transpose(1, 2).unflatten(1, (heads // key_heads, key_heads)).transpose(1, 2).flatten(1, 2)
