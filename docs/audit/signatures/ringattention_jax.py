"""ringattention, on as many devices of the host as XLA_FLAGS makes: audit with --ranks 1,2,4 --length 24."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.shard_map import shard_map
from jax.sharding import Mesh, PartitionSpec

ACCEPTS = ("causal", "documents")
LIBRARY = "jax"
CHUNKS = 2  # of queries and of keys on each device, so that chunks are merged there too


def attention(function, q, k, v, *, ring_size, causal=False, documents=None):
    length = q.shape[2]
    chunk = length // ring_size // CHUNKS
    shards, whole = PartitionSpec(None, "sp", None, None), PartitionSpec(None, None)
    blocks = {
        "causal_block_size": 1 if causal else None, "deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0,
        "query_chunk_size": chunk, "key_chunk_size": chunk, "dtype": jnp.float32, "precision": None,
        "policy": jax.checkpoint_policies.nothing_saveable, "prevent_cse": True,
    }  # fmt: skip
    sharded = shard_map(
        partial(function, axis_name="sp", float32_logits=True, cache_idx=None, blockwise_kwargs=blocks),
        mesh=Mesh(np.array(jax.devices()[:ring_size]), ("sp",)),
        in_specs=(shards, shards, shards, PartitionSpec(None, None, None, None), whole),
        out_specs=shards,
        check_rep=False,
    )
    bias = jnp.zeros((1, 1, 1, length), jnp.float32)
    ids = jnp.zeros(length, jnp.int32) if documents is None else jnp.asarray(documents, jnp.int32)
    out = jax.jit(sharded)(*(x.swapaxes(1, 2) for x in (q, k, v)), bias, ids[None])
    return out.swapaxes(1, 2)
