"""Dilated attention as modules, with the names and arguments that other packages have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ringcore import (
    DtypeError,
    Kernels,
    KeywordError,
    Layout,
    ShapeError,
    UnsupportedError,
    check_dilation,
    dilated_attention,
)


class DilatedAttention(nn.Module):
    """`ringcore.dilated_attention` of tensors [B, N, H, D], with the arguments of dilated-attention-pytorch.

    segment_lengths, dilation_rates: one of both for each branch. softmax_scale: 1 / sqrt(D) if None.
    attention_dropout: a rate, in training alone; its seed is drawn from torch's default generator, which ranks of a
    ring must have seeded alike. torch.compile would take one seed for all calls: it is refused. The others are keywords
    of `ringcore.dilated_attention`; with ``ring`` the tensors are this rank's shards.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        *,
        head_offset: str = "modulo",
        ring: Any = None,
        ring_size: int | None = None,
        layout: str | Layout = "contiguous",
        kernels: Kernels | str | None = None,
    ) -> None:
        super().__init__()
        dilation = check_dilation(segment_lengths, dilation_rates, head_offset)
        self.segment_lengths, self.dilation_rates = zip(*dilation.branches, strict=True)
        if isinstance(attention_dropout, bool) or not 0 <= attention_dropout < 1:
            raise KeywordError(f"attention_dropout is {attention_dropout!r}; it must be a rate from 0 on, less than 1.")
        self.softmax_scale, self.dropout_p = softmax_scale, attention_dropout
        self.head_offset, self.layout = head_offset, layout
        self.ring, self.ring_size, self.kernels = ring, ring_size, kernels

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        """Attention [B, N, H, D] of query, key and value [B, N, H, D]; key and value may have fewer heads."""
        drops = self.training and self.dropout_p != 0
        if drops and torch.compiler.is_compiling():
            raise UnsupportedError(
                "attention_dropout draws a seed for each call, which torch.compile would take for a constant. Leave "
                "this module out with torch.compiler.disable, or set the rate to 0."
            )
        seed = int(torch.randint(1 << 62, ()).item()) if drops else None
        out: Tensor = dilated_attention(
            query, key, value, segment_lengths=self.segment_lengths, dilation_rates=self.dilation_rates,
            head_offset=self.head_offset, causal=is_causal, scale=self.softmax_scale,
            dropout=self.dropout_p if drops else 0.0, dropout_seed=seed, axes="bshd",
            ring=self.ring, ring_size=self.ring_size, layout=self.layout, kernels=self.kernels,
        )  # fmt: skip
        return out

    def extra_repr(self) -> str:
        """The branches."""
        return f"segment_lengths={self.segment_lengths}, dilation_rates={self.dilation_rates}"


class MultiheadDilatedAttention(nn.Module):
    """Projections of queries, keys and values, dilated attention, a norm and a projection: MAGNETO's, as LongNet has.

    The arguments, and the names of the parameters, are those of dilated-attention-pytorch, so that its weights load;
    further keywords are those of `DilatedAttention`.

    Raises KeywordError if the heads do not divide ``embed_dim``.
    Source: Wang et al. 2022, arXiv:2210.06423, figure 2, for the norm and the initial weights.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dilation_rates: Sequence[int],
        segment_lengths: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **further: Any,
    ) -> None:
        super().__init__()
        whole = isinstance(embed_dim, int) and isinstance(num_heads, int)
        if not whole or num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise KeywordError(
                f"embed_dim is {embed_dim!r} and num_heads {num_heads!r}; they must be whole numbers, of which the "
                "second divides the first."
            )
        self.num_heads = num_heads
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed_dim, embed_dim, bias, **where) for _ in range(3))
        self.attention = DilatedAttention(segment_lengths, dilation_rates, attention_dropout=dropout, **further)
        self.norm = nn.LayerNorm(embed_dim, layer_norm_eps, **where) if layer_norm else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **where)
        for layer, gain in (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, gamma_init),
            (self.out_proj, gamma_init),
        ):
            nn.init.xavier_normal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> tuple[Tensor, None]:
        """(Attention [B, N, embed_dim], None) of query, key and value [B, N, embed_dim]: weights are never made."""
        width = self.q_proj.in_features
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise DtypeError(f"{name} is a {type(x).__name__}; it must be a tensor.")
            if x.ndim != 3 or x.shape[2] != width:
                raise ShapeError(f"{name} has shape {tuple(x.shape)}; it must be [B, N, {width}].")
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1))
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        out = self.attention(q, k, v, is_causal).flatten(-2)
        return self.out_proj(out if self.norm is None else self.norm(out)), None
