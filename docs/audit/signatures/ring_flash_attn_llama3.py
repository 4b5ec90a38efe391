"""llama3_flash_attn_varlen_func of ring-flash-attn, over flash_attn_here: audit with --launcher torchrun, contiguous.

It gathers keys and values, one key head at a time, and packs documents end to end. In float16 or bfloat16.
"""

import flash_attn_here
import numpy as np
import torch
import torch.distributed as dist

flash_attn_here.install()

ACCEPTS = "causal", "grouped", "scale", "documents"
LIBRARY = "torch"


def attention(function, q, k, v, *, ring_size, ring=None, causal=False, scale=None, documents=None):
    from ring_flash_attn import llama3_flash_attn_prepare_cu_seqlens

    length = q.shape[2] * ring_size
    starts = [] if documents is None else (np.flatnonzero(np.diff(documents)) + 1).tolist()
    ends = torch.tensor([0, *starts, length], dtype=torch.int32)
    of_q, of_k, longest_q, longest_k, mine = llama3_flash_attn_prepare_cu_seqlens(
        ends, causal=causal, rank=dist.get_rank(ring), world_size=ring_size
    )
    of_q, of_k = of_q.to(q.device), of_k.to(q.device)
    packed = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    out = function(
        *packed, of_q, of_k, longest_q, longest_k, heads_k_stride=1, local_k_slice=mine, causal=causal,
        softmax_scale=scale, group=ring,
    )  # fmt: skip
    return out.transpose(0, 1)[None]
