"""Other attentions of packed documents over all ranks, causal, to be timed beside ours.

Each of `RINGS` takes where documents end, and gives the attention of this rank's rows [1, S, H, D] and what takes those
rows of a whole array.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import peers
import torch
import torch.distributed as dist
from gpu import DEVICE, Attend, Tensor

Rows = Callable[[Tensor], Tensor]


def flash4(ends: list[int]) -> Attend | None:
    """flash-attn-4's kernel for sequences end to end, on one GPU; None where it is not installed."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError:
        return None
    places, longest = _places(ends)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q[0], k[0], v[0], cu_seqlens_q=places, cu_seqlens_k=places, max_seqlen_q=longest, max_seqlen_k=longest,
            causal=True,
        )[0]  # fmt: skip
        return out[None]

    return attend


def llama3(ends: list[int], heads: int) -> tuple[Attend, Rows]:
    """ring-flash-attn's gathering of keys, ``heads`` of them at a time, on torch's FlashAttention-2."""
    module = peers.ring_flash_attn_module("llama3_flash_attn_varlen")
    rank, size = dist.get_rank(), dist.get_world_size()
    places, _ = _places(ends)
    *sides, keys = module.llama3_flash_attn_prepare_cu_seqlens(places.cpu(), True, rank, size)
    sides = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in sides]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.llama3_flash_attn_varlen_func(
            q[0], k[0], v[0], *sides, heads_k_stride=heads, local_k_slice=keys, causal=True
        )
        return out[None]

    return attend, lambda x: x.chunk(size, 1)[rank]


def zigzag(ends: list[int]) -> tuple[Attend, Rows]:
    """ring-flash-attn's ring over documents that are cut for all ranks each, on torch's FlashAttention-2."""
    module = peers.ring_flash_attn_module("zigzag_ring_flash_attn_varlen")
    rank, size = dist.get_rank(), dist.get_world_size()
    places, longest = _places([end // size for end in ends])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = module.zigzag_ring_flash_attn_varlen_func(q[0], k[0], v[0], places, longest, causal=True)
        return out[None]

    def rows(x: Tensor) -> Tensor:
        found = []
        for start, stop in pairwise(ends):
            pieces = x[:, start:stop].chunk(2 * size, 1)
            found += [pieces[rank], pieces[2 * size - 1 - rank]]
        return torch.cat(found, 1)

    return attend, rows


def flex(ends: list[int], balance: str) -> tuple[Attend, Rows]:
    """torch's context parallelism for compiled FlexAttention, which gathers keys, with one of its load balancers."""
    from torch.distributed.tensor.experimental._context_parallel import _attention, _cp_custom_ops, _load_balancer
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, size = ends[-1], dist.get_world_size()
    mesh = dist.init_device_mesh(DEVICE, (size,))
    lengths = torch.tensor(ends, device=DEVICE).diff()
    ids = torch.repeat_interleave(torch.arange(len(ends) - 1, device=DEVICE), lengths)

    def seen(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (ids[i] == ids[j]) & (j <= i)

    def balancer() -> Any:
        if balance == "per document":
            return _load_balancer._PerDocumentHeadTailLoadBalancer([lengths.tolist()], size, DEVICE)
        if balance == "by blocks":
            whole = torch.compile(create_block_mask)(seen, 1, 1, length, length, device=DEVICE)
            return _load_balancer._PTRRLoadBalancer(whole, size)
        return _load_balancer._HeadTailLoadBalancer(length, size, DEVICE)

    chosen = balancer()
    mask = _attention._create_cp_block_mask(seen, 1, 1, length, length, mesh, chosen)
    places = chosen._generate_indices()[0].chunk(size)[dist.get_rank()]
    compiled = torch.compile(flex_attention, dynamic=False)
    name = mesh.get_group().group_name

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        k, v = _cp_custom_ops.flex_cp_allgather(k, v, 2, name)
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out.transpose(1, 2)

    return attend, lambda x: x[:, places]


def _places(ends: list[int]) -> tuple[Tensor, int]:
    """Where documents end, as kernels take it, and the longest."""
    places = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    return places, int(places.diff().max())


RINGS: dict[str, Callable[[list[int]], tuple[Attend, Rows]]] = {
    "torch FlexAttention, head-tail": partial(flex, balance="head and tail"),
    "torch FlexAttention, head-tail per document": partial(flex, balance="per document"),
    "torch FlexAttention, by blocks (PTRR)": partial(flex, balance="by blocks"),
    "ring-flash-attn llama3, all heads at once": partial(llama3, heads=16),
    "ring-flash-attn llama3, 4 heads at a time": partial(llama3, heads=4),
    "ring-flash-attn zigzag varlen": zigzag,
}
