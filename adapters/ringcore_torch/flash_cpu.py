"""Torch's own flash attention on the CPU, forward and backward, on one tile."""

from __future__ import annotations

import torch

from ringcore import Band, Capabilities, Gradients, Partial, Score, Tile
from ringcore_torch.partials import from_kernel
from ringcore_torch.widths import even, with_lse_gradient

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlashCpu:
    """Attention over one tile by the kernels beneath torch's scaled_dot_product_attention on the CPU."""

    capabilities = Capabilities(
        "torch.cpu",
        libraries=frozenset({"torch"}),
        devices=frozenset({"cpu"}),
        bias=False,  # where all scores of a tile are finfo.min, its lse has lost the number of keys
        softcap=False,
        fused=True,
        bands="triangles",
        poison_rows=False,
    )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, score: Score, tile: Tile,
        bias: None = None, mask: torch.Tensor | None = None, state: None = None,
    ) -> Partial:  # fmt: skip
        """The tile's own partial; see `ringcore.Kernels`."""
        values = v.shape[3]
        q, k, v = even(q, k, v)
        hidden = _hidden(tile.band, mask, q, k)
        causal = hidden is None and tile.band != Band()
        k, v = _seen_alone(hidden, k, v)
        out, lse = _forward(q, k, v, 0.0, causal, attn_mask=hidden, scale=score.scale)
        out = out if out.shape[3] == values else out[..., :values]
        part = from_kernel(out, lse)
        if hidden is None:
            return part
        empty = (hidden == -torch.inf).all(-1)  # the kernel says lse 0 there
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
        return Partial(out, lse, part.total.masked_fill(empty, 0.0))

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        maximum: torch.Tensor, total: torch.Tensor, delta: None, *, score: Score, tile: Tile,
        bias: None = None, mask: torch.Tensor | None = None, into: Gradients,
        out: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None,
    ) -> Gradients:  # fmt: skip
        """The tile's own gradients; see `ringcore.Kernels`."""
        widths = q.shape[3], k.shape[3], v.shape[3]
        if dlse is not None:
            dout, v, out = with_lse_gradient(dout, v, out, dlse)
        q, k, v, dout, out = even(q, k, v, dout, out)
        hidden = _hidden(tile.band, mask, q, k)
        causal = hidden is None and tile.band != Band()
        k, v = _seen_alone(hidden, k, v)
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        apart = group > 1 and q.dtype in (torch.float16, torch.bfloat16)  # the kernel would add in these types
        if apart:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        dq, dk, dv = _backward(dout, q, k, v, out, lse.contiguous(), 0.0, causal, attn_mask=hidden, scale=score.scale)
        if apart:
            dk, dv = (x.unflatten(1, (heads, group)).sum(2, dtype=torch.float32) for x in (dk, dv))
        return Gradients(*(x[..., :width] for x, width in zip((dq, dk, dv), widths, strict=True)))


def _seen_alone(hidden: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v with 0 in keys that no row sees: the kernel multiplies what they hold by 0, NaN included."""
    if hidden is None:
        return k, v
    unseen = (hidden == -torch.inf).all(-2)[..., None]  # [B or 1, H or 1, T, 1]
    unseen = unseen.all(1, keepdim=True)  # a head of k may serve several heads of q
    return k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)


def _hidden(band: Band, mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores, -inf where hidden; four axes, each of full length or 1.

    None where the kernel needs no mask: without a band, or causal from the upper left corner.
    """
    if mask is None and band in (Band(), Band(None, 0)):
        return None
    height, width = q.shape[2], k.shape[2]
    hidden = torch.zeros((height, width), dtype=torch.bool, device=q.device)
    distance = torch.arange(width, device=q.device) - torch.arange(height, device=q.device)[:, None]
    if band.lo is not None:
        hidden |= distance < band.lo
    if band.hi is not None:
        hidden |= distance > band.hi
    hidden = hidden[None, None] if mask is None else hidden | ~mask
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
