"""Dilated attention over a ring: `ring_attention` whose queries see the keys of their segments alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ringcore.api import Pullback, attend, with_pullback
from ringcore.call import Call
from ringcore.inputs import Inputs
from ringcore.layout import Layout
from ringcore.protocols import Kernels
from ringcore.values import Array


def dilated_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offset: str = "modulo",
    ring: Any = None,
    ring_size: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_lengths: Sequence[int] | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    layout: str | Layout = "contiguous",
    q_layout: str | Layout | None = None,
    k_layout: str | Layout | None = None,
    axes: str = "bhsd",
    return_lse: bool = False,
    kernels: Kernels | str | None = None,
) -> Any:
    """Exact dilated attention over a sequence that is split across a ring.

    There is a branch for each pair of w in ``segment_lengths`` and r in ``dilation_rates``. It cuts the sequence into
    segments of w positions, and head h keeps every r-th of a segment, from its offset on: those see each other. All
    branches together are one softmax, in which a key counts as often as branches show it. A query that is in no branch
    for some head gives out 0 and lse -inf there.

    Shapes, dtypes and units are those of `ringcore.ring_attention`, for q and k of the same length. Segments need not
    end with shards, nor r divide w, nor w the length. A rank is sent the rows of k and v from the first to the last
    that it reads, and nothing of segments that lie within shards.

    Keywords:
        segment_lengths, dilation_rates: whole numbers, 1 or more, one of both for each branch.
        head_offset: "modulo", h % r, or "block", h // ceil(H / r), so that neighbouring heads share an offset.
        causal: a query sees the keys at its own position and before.
        ring, ring_size, scale, softcap, key_lengths, dropout, dropout_seed, layout, q_layout, k_layout, axes,
            return_lse, kernels: as in `ringcore.ring_attention`. ``layout="auto"``, without ``ring``, deals the work
            evenly.

    Raises the errors of `ringcore.errors`, on every rank of a ring, before any tensor data is sent.
    Source: Ding et al. 2023 (LongNet), arXiv:2307.02486, equations 3 to 15.
    """
    return attend(
        "dilated_attention", Inputs.of(q, k, v), return_lse,
        ring=ring, ring_size=ring_size, causal=causal, window=None, scale=scale, softcap=softcap, query_offset=0,
        key_lengths=key_lengths, layout=layout, q_layout=q_layout, k_layout=k_layout, axes=axes, kernels=kernels,
        dropout=dropout, dropout_seed=dropout_seed, dilation=(segment_lengths, dilation_rates, head_offset),
    )  # fmt: skip


def dilated_attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offset: str = "modulo",
    wrt: Sequence[str] = ("q", "k", "v"),
    ring: Any = None,
    ring_size: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    key_lengths: Sequence[int] | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    layout: str | Layout = "contiguous",
    q_layout: str | Layout | None = None,
    k_layout: str | Layout | None = None,
    axes: str = "bhsd",
    kernels: Kernels | str | None = None,
) -> tuple[tuple[Array, Array], Pullback]:
    """Attention as `dilated_attention`, with its pullback as in `ringcore.ring_attention_vjp`.

    The gradients go through the weights with which branches are mixed.
    """
    call = Call(
        "dilated_attention_vjp", ring=ring, ring_size=ring_size, causal=causal, window=None, scale=scale,
        softcap=softcap, query_offset=0, key_lengths=key_lengths, layout=layout, q_layout=q_layout, k_layout=k_layout,
        axes=axes, kernels=kernels, dropout=dropout, dropout_seed=dropout_seed,
        dilation=(segment_lengths, dilation_rates, head_offset), gradient=True, wrt=wrt,
    )  # fmt: skip
    return with_pullback(call, Inputs.of(q, k, v))
