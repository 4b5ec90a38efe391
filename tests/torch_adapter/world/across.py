"""Whole arrays to shards and back, as autograd sees it: only across all ranks can a gradient be checked."""

import torch
import torch.distributed as dist

import ringcore


def gathered(x, layout, axis=2):
    """Every rank's shard of x as one whole, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.detach())
    return ringcore.unshard(parts, layout, axis)


class ToShard(torch.autograd.Function):
    """This rank's rows of what every rank holds whole; the gradient is whole again."""

    @staticmethod
    def forward(ctx, whole, layout, axis=2):
        ctx.where = layout, axis
        return ringcore.shard(whole, layout, dist.get_rank(), dist.get_world_size(), axis)

    @staticmethod
    def backward(ctx, gradient):
        return gathered(gradient, *ctx.where), None, None


class ToWhole(torch.autograd.Function):
    """All ranks' rows, of which every rank then computes the same loss."""

    @staticmethod
    def forward(ctx, shard, layout, axis=2):
        ctx.where = layout, axis
        return gathered(shard, layout, axis)

    @staticmethod
    def backward(ctx, gradient):
        layout, axis = ctx.where
        return ringcore.shard(gradient, layout, dist.get_rank(), dist.get_world_size(), axis), None, None


def whole_attention(q, k, v, *, ring, layout="contiguous", axes="bhsd", bias=None, **keywords):
    """(out, lse) of whole arrays, over the ring."""
    axis = axes.index("s")
    q, k, v = (ToShard.apply(x, layout, axis) for x in (q, k, v))
    if bias is not None:
        bias = ToShard.apply(bias, layout, bias.ndim - 2)
    out, lse = ringcore.ring_attention(
        q, k, v, ring=ring, layout=layout, axes=axes, bias=bias, return_lse=True, **keywords
    )
    return ToWhole.apply(out, layout, axis), ToWhole.apply(lse, layout, 2)


def draw(rows=5, heads=2, key_heads=1, width=2, values=2, dtype=torch.float64, grad=True):
    """Seeded whole q, k, v, equal on every rank."""
    generator = torch.Generator().manual_seed(5)
    shapes = (1, heads, rows, width), (1, key_heads, rows, width), (1, key_heads, rows, values)
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def dense(q, k, v, causal=True):
    """(out, lse) written out, with whole matrices in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=torch.float64).triu(1)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)
