"""The fused kernels in float32 for GPUs that Torch itself brings: CUTLASS's memory-efficient attention, on one tile."""

from __future__ import annotations

import torch

from ringcore import Band, Capabilities, Gradients, Partial, Score, Tile
from ringcore_torch.partials import from_kernel
from ringcore_torch.widths import even, with_lse_gradient

_ALIGNED = 4  # numbers of float32 that the kernels load at once
_ROWS = 32  # their lse has room for a multiple of so many

Tensor = torch.Tensor


class Efficient:
    """Attention over one tile in float32: products of three TF32 parts, as exact as float32's own.

    Half types have faster kernels, and a bias or mask others that neither copy nor round it.
    """

    capabilities = Capabilities(
        "torch.cuda.efficient", dtypes=frozenset({"float32"}), libraries=frozenset({"torch"}),
        devices=frozenset({"cuda"}), bias=False, mask=False, softcap=False, window=False, bias_gradient=False,
        fused=True, bands="triangles", preference=8, poison_rows=False, head_multiple=_ALIGNED,
    )  # fmt: skip

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        return torch.cuda.is_current_stream_capturing()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, score: Score, tile: Tile,
        bias: None = None, mask: None = None, state: None = None,
    ) -> Partial:  # fmt: skip
        """The tile's own partial; see `ringcore.Kernels`."""
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            *_sequence_first(q, *_for_each_head(q, k, v)), None, None, None, None, None, 0.0, _causal(tile.band), True,
            scale=score.scale,
        )  # fmt: skip
        return from_kernel(out.transpose(1, 2), lse[:, :, : q.shape[2]])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, maximum: Tensor, total: Tensor, delta: None, *,
        score: Score, tile: Tile, bias: None = None, mask: None = None, into: Gradients, out: Tensor,
        lse: Tensor, dlse: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """The tile's own gradients; see `ringcore.Kernels`."""
        width, groups = v.shape[3], k.shape[1]
        if dlse is not None:
            dout, v, out = even(*with_lse_gradient(dout, v, out, dlse), multiple=_ALIGNED)
        k, v = _for_each_head(q, k, v)
        batch, heads, rows = lse.shape
        given = lse.new_full((batch, heads, rows + -rows % _ROWS), torch.inf)
        given[:, :, :rows] = lse
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # what dropout would need
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            dout.transpose(1, 2).contiguous(), *_sequence_first(q, k, v), None, out.transpose(1, 2).contiguous(), None,
            None, rows, k.shape[2], given, 0.0, unused, unused, _causal(tile.band), False, scale=score.scale,
        )  # fmt: skip
        dk, dv = (x if groups == heads else x.unflatten(2, (groups, -1)).sum(3) for x in (dk, dv))
        return Gradients(dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)[..., :width])


def _sequence_first(*tensors: Tensor) -> list[Tensor]:
    """[B, H, S, D] as [B, S, H, D], whose last axis has no gaps and whose rows begin where the kernels can load."""
    swapped = (x.transpose(1, 2) for x in tensors)
    return [x if _loadable(x) else x.contiguous() for x in swapped]


def _loadable(x: Tensor) -> bool:
    bytes_at_once = _ALIGNED * x.itemsize
    return (
        x.stride(3) == 1 and not any(step % _ALIGNED for step in x.stride()[:3]) and x.data_ptr() % bytes_at_once == 0
    )


def _for_each_head(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Keys or values for every head of q: these kernels know no grouped heads."""
    return [x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in tensors]


def _causal(band: Band) -> int:
    """What the kernels call no mask, and a causal one from the upper left corner."""
    return 0 if band == Band() else 1
