"""Torch's own flash attention on the CPU, forward and backward, on one tile."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ringcore import Band, Capabilities, Gradients, Partial, Score, Tile, empty_partial
from ringcore_torch.partials import add_rows, from_kernel
from ringcore_torch.pieces import Piece, pieces, strips

_SIDE = 256  # rows of a strip under a mask: its mask is made, and its hidden part computed in vain

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
        lse_only=True,
        whole_rows=True,
        poison_rows=False,
    )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, score: Score, tile: Tile,
        bias: None = None, mask: torch.Tensor | None = None, state: Partial | None = None,
    ) -> Partial:  # fmt: skip
        """The tile's partial merged into ``state``; see `ringcore.Kernels`."""
        height, width = q.shape[2], k.shape[2]
        values = v.shape[3]
        q, k, v = _even(q, k, v)
        state = state and state.widened
        for piece in _pieces(tile.band, height, width, mask):
            hidden = _hidden(piece, mask, q)
            rows, columns = piece.rows, piece.columns
            out, lse = _forward(
                q[:, :, rows], k[:, :, columns], v[:, :, columns], 0.0, piece.causal,
                attn_mask=hidden, scale=score.scale,
            )  # fmt: skip
            out = out[..., :values]
            if hidden is not None:
                lse = lse.masked_fill((hidden == -torch.inf).all(-1), -torch.inf)  # the kernel says 0
            if state is None and hidden is None and len(range(height)[rows]) == height:
                state = from_kernel(out, lse)
            else:
                state = (state or empty_partial(q, values)).widened
                add_rows(state, rows, out, lse)
        return state or empty_partial(q, values)

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        maximum: torch.Tensor, total: torch.Tensor, delta: None, *, score: Score, tile: Tile,
        bias: None = None, mask: torch.Tensor | None = None, into: Gradients,
        out: torch.Tensor, dlse: torch.Tensor | None,
    ) -> Gradients:  # fmt: skip
        """``into`` plus the tile's gradients; see `ringcore.Kernels`."""
        height, width = q.shape[2], k.shape[2]
        wide_q, wide_v = q.shape[3], v.shape[3]
        if dlse is not None:
            dout, v, out = with_lse_gradient(dout, v, out, dlse)
        lse = finished_lse(maximum, total)
        q, k, v, dout, out = _even(q, k, v, dout, out)
        for piece in _pieces(tile.band, height, width, mask):
            rows, columns = (slice(None), slice(None), piece.rows), (slice(None), slice(None), piece.columns)
            dq, dk, dv = _backward(
                dout[rows], q[rows], k[columns], v[columns], out[rows], lse[rows].contiguous(), 0.0, piece.causal,
                attn_mask=_hidden(piece, mask, q), scale=score.scale,
            )  # fmt: skip
            for sums, part, index in ((into.dq, dq, rows), (into.dk, dk, columns), (into.dv, dv, columns)):
                if sums is not None:
                    sums[index] += part[..., : wide_v if sums is into.dv else wide_q]
        return into


def finished_lse(maximum: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """maximum + log(total) [B, H, S]; +inf in rows that saw no key, whose weights exp(s - lse) are then 0."""
    seen = (maximum != -torch.inf) & (total != 0)
    return torch.where(seen, maximum + torch.log(torch.where(seen, total, 1.0)), torch.inf)


def with_lse_gradient(
    dout: torch.Tensor, v: torch.Tensor, out: torch.Tensor, dlse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dout, v and out with one column more, by which a kernel that knows no dlse takes it into account.

    Scores get weights * (dout v - dout out): with v 1, out 0 and dout dlse in the new column that gains weights * dlse.
    """
    column = dlse[..., None].to(dout.dtype)
    return torch.cat([dout, column], -1), pad(v, (0, 1), value=1.0), pad(out, (0, 1))


def _even(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with columns of 0 up to one width, their last axis without gaps: the kernel reads no other."""
    width = max(x.shape[3] for x in tensors)
    evened = (x if x.shape[3] == width else pad(x, (0, width - x.shape[3])) for x in tensors)
    return [x if x.stride(3) == 1 or width == 1 else x.contiguous() for x in evened]


def _pieces(band: Band, height: int, width: int, mask: torch.Tensor | None) -> list[Piece]:
    cut = pieces if mask is None else strips
    return list(cut(band, height, width, _SIDE))


def _hidden(piece: Piece, mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of a piece, -inf where hidden; four axes, each of full length or 1."""
    if mask is None and piece.band == Band():
        return None
    rows, columns = piece.rows, piece.columns
    height, width = rows.stop - rows.start, columns.stop - columns.start
    hidden = torch.zeros((height, width), dtype=torch.bool, device=q.device)
    if piece.band != Band():
        distance = torch.arange(width, device=q.device) - torch.arange(height, device=q.device)[:, None]
        if piece.band.lo is not None:
            hidden |= distance < piece.band.lo
        if piece.band.hi is not None:
            hidden |= distance > piece.band.hi
    if mask is not None:
        seen = mask[:, :, rows if mask.shape[2] > 1 else slice(None), columns if mask.shape[3] > 1 else slice(None)]
        hidden = hidden | ~seen
    hidden = hidden.expand((1,) * (4 - hidden.ndim) + hidden.shape)
    return torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
