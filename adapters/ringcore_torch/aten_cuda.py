"""The fused kernels for GPUs that Torch itself brings, on one tile: cuDNN's, and FlashAttention-2."""

from __future__ import annotations

import torch

from ringcore import Band, Capabilities, Gradients, Partial, Score, Tile
from ringcore_torch.partials import from_kernel
from ringcore_torch.widths import even, with_lse_gradient

_HALF = frozenset({"float16", "bfloat16"})
_ALIGNED = 8  # numbers of a half type that the kernels load at once
_BLOCK = 128  # keys that cuDNN's backward takes at once
_COLUMN = 8  # that a gradient of lse takes more, in their units

Tensor = torch.Tensor


class AtenKernels:
    """What both share: attention over one tile in half types, out and lse, gradients from the finished rows."""

    capabilities: Capabilities

    def attend(self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> tuple[Tensor, Tensor]:
        """out [B, H, S, E] and lse [B, H, S]."""
        raise NotImplementedError

    def pull_back(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        raise NotImplementedError

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        return torch.cuda.is_current_stream_capturing()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, score: Score, tile: Tile,
        bias: None = None, mask: None = None, state: None = None,
    ) -> Partial:  # fmt: skip
        """The tile's own partial; see `ringcore.Kernels`."""
        q, k, v = even(q, k, v, multiple=_ALIGNED)
        return from_kernel(*self.attend(q, k, v, tile.band, score.scale))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, maximum: Tensor, total: Tensor, delta: None, *,
        score: Score, tile: Tile, bias: None = None, mask: None = None, into: Gradients, out: Tensor,
        lse: Tensor, dlse: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """The tile's own gradients; see `ringcore.Kernels`."""
        widths = q.shape[3], k.shape[3], v.shape[3]
        kernels: AtenKernels = self
        if dlse is not None:
            kernels = Flash2()  # whose heads may be as wide as that makes them
            dout, v, out = with_lse_gradient(dout, v, out, dlse)
        q, k, v, dout, out = even(q, k, v, dout, out, multiple=_ALIGNED)
        found = kernels.pull_back(dout, q, k, v, out, lse.contiguous(), tile.band, score.scale)
        return Gradients(*(x[..., :width] for x, width in zip(found, widths, strict=True)))


class Cudnn(AtenKernels):
    """cuDNN's attention."""

    capabilities = Capabilities(
        "torch.cuda.cudnn", dtypes=_HALF, libraries=frozenset({"torch"}), devices=frozenset({"cuda"}),
        bias=False, mask=False, softcap=False, window=False, fused=True, half_gradients=True, bands="squares",
        preference=20, poison_rows=False, largest_head=128, head_multiple=_ALIGNED, equal_heads=True,
    )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> tuple[Tensor, Tensor]:
        """out [B, H, S, E] and lse [B, H, S]."""
        if q.shape[2] == k.shape[2] == 1:  # cuDNN takes no such tile
            return Flash2().attend(q, k, v, band, scale)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, band != Band(), False, scale=scale
        )
        return out, lse[..., 0] if lse.ndim == 4 else lse

    def pull_back(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        # cuDNN forgets to hide what is past the last key, and rows beside a single one: where lse is below -88 its
        # exp(0 - lse) overflows there, and dq, or dk and dv, become inf or NaN. Torch's operator takes no lengths.
        # Nor does it give the same bits on every run.
        if k.shape[2] % _BLOCK or q.shape[2] == 1 or torch.are_deterministic_algorithms_enabled():
            return Flash2().pull_back(dout, q, k, v, out, lse, band, scale)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], *_random_state(q), None, None, None, q.shape[2], k.shape[2], 0.0,
            band != Band(), scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class Flash2(AtenKernels):
    """FlashAttention-2."""

    capabilities = Capabilities(
        "torch.cuda.flash2", dtypes=_HALF, libraries=frozenset({"torch"}), devices=frozenset({"cuda"}),
        bias=False, mask=False, softcap=False, fused=True, half_gradients=True, bands="windows", preference=10,
        preference_for_few=40, poison_rows=False, largest_head=256 - _COLUMN, head_multiple=_ALIGNED, equal_heads=True,
    )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float) -> tuple[Tensor, Tensor]:
        """out [B, H, S, E] and lse [B, H, S]."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), None, None, q.shape[2], k.shape[2], 0.0, False, False,
            scale=scale, **_window(q, k, band),
        )  # fmt: skip
        return out.transpose(1, 2), lse

    def pull_back(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, None, None, q.shape[2], k.shape[2], 0.0, False,
            *_random_state(q), scale=scale, **_window(q, k, band),
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _window(q: Tensor, k: Tensor, band: Band) -> dict[str, int | None]:
    """The band as a window around a diagonal that ends in the lower right corner."""
    shift = k.shape[2] - q.shape[2]
    return {
        "window_size_left": None if band.lo is None else shift - band.lo,
        "window_size_right": None if band.hi is None else band.hi - shift,
    }


def _random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """What dropout would need: read by nothing, but asked for."""
    state = torch.empty(2, dtype=torch.int64, device=q.device)
    return state, state
