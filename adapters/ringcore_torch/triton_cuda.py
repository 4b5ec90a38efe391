"""Kernels of our own for GPUs, in Triton: bias, mask, float32, and widths that the libraries' kernels do not take."""

from __future__ import annotations

import torch

from ringcore import Capabilities, Gradients, Partial, Score, Tile
from ringcore_torch.triton_backward import bias_gradient, key_gradients, query_gradient
from ringcore_torch.triton_forward import forward
from ringcore_torch.triton_launch import Launch, ordered_like, without_gaps

Tensor = torch.Tensor

_KEY, _VALUE = 1, 2


class Triton:
    """Attention over one tile under any band, with bias and mask read where they are."""

    capabilities = Capabilities(
        "torch.cuda.triton", dtypes=frozenset({"float16", "bfloat16", "float32"}), libraries=frozenset({"torch"}),
        devices=frozenset({"cuda"}), dropout=True, fused=True, preference=5, poison_rows=False, largest_head=256,
    )  # fmt: skip

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, score: Score, tile: Tile,
        bias: Tensor | None = None, mask: Tensor | None = None, state: None = None,
    ) -> Partial:  # fmt: skip
        """The tile's own partial, in float32; see `ringcore.Kernels`."""
        launch = Launch(q, k, v, bias, mask, tile, score)
        weighted = ordered_like(q[..., :1].expand(*q.shape[:3], v.shape[3]))
        maximum, total = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
        launch.over_rows(forward, launch.with_seen(_VALUE), (maximum, total), (weighted,))
        return Partial(weighted, maximum, total)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, maximum: Tensor, total: Tensor, delta: None, *,
        score: Score, tile: Tile, bias: Tensor | None = None, mask: Tensor | None = None, into: Gradients,
        out: Tensor, lse: Tensor, dlse: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """The tile's own gradients, in float32, and that of the bias added to ``into``'s; see `ringcore.Kernels`.

        They are made from maximum and total: lse alone has lost what many scores of -1e38 add up to.
        """
        launch = Launch(q, k, v, bias, mask, tile, score)
        dout, out, dlse = without_gaps(dout), without_gaps(out), None if dlse is None else dlse.contiguous()
        maximum, total = maximum.contiguous(), total.contiguous()
        difference = torch.empty_like(maximum)  # rowsum(dout * out) - dlse
        dq, dk, dv = ordered_like(q), ordered_like(k), ordered_like(v)
        launch.over_rows(
            query_gradient, launch.with_seen(_KEY), (maximum, total, maximum if dlse is None else dlse, difference),
            (dout, out, dq), with_dlse=dlse is not None,
        )  # fmt: skip
        statistics = maximum, total, difference
        launch.over_keys(key_gradients, statistics, (dout, dk, dv))
        if into.dbias is not None:
            launch.over_bias(bias_gradient, statistics, dout, into.dbias)
        return Gradients(dq, dk, dv, into.dbias)


def load(sharers: int = 1) -> Triton:
    """The kernels; the host's cores do not matter to them."""
    return Triton()
