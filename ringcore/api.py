"""The public functions: exact attention over a ring, forward and with its pullback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from ringcore.arguments import Arguments
from ringcore.call import Call, check_output_gradients
from ringcore.discovery import autograd_adapter
from ringcore.errors import KeywordError
from ringcore.inputs import PULLBACK, Inputs, check_detached, swap_axes
from ringcore.keywords import check_flag
from ringcore.layout import Layout
from ringcore.partial import Partial
from ringcore.positions import Mask
from ringcore.protocols import Kernels
from ringcore.resumption import check_partial
from ringcore.routes import RING, Schedule
from ringcore.values import Array


class Pullback(Protocol):
    """Gradients for those of a call's results: ``pullback(dout, dlse=None)``, in the order of ``wrt``."""

    def __call__(self, dout: Array, dlse: Array | None = None) -> tuple[Array, ...]:
        """The gradients for dout (out's shape and dtype) and dlse [B, H, S]."""
        ...


def ring_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    ring: Any = None,
    ring_size: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    mask: Array | Mask | None = None,
    query_offset: int | Sequence[int] = 0,
    key_lengths: Sequence[int] | None = None,
    documents: Any = None,
    cu_seqlens: Any = None,
    sinks: Array | None = None,
    prefix: tuple[Array, Array] | None = None,
    alibi: Array | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    layout: str | Layout = "contiguous",
    q_layout: str | Layout | None = None,
    k_layout: str | Layout | None = None,
    schedule: Schedule = RING,
    axes: str = "bhsd",
    return_lse: bool = False,
    partial: Partial | None = None,
    return_partial: bool = False,
    reduce_replicated: bool = False,
    kernels: Kernels | str | None = None,
) -> Any:
    """Exact softmax attention over a sequence that is split across a ring.

    Without ``ring`` the arrays are whole and the ring of ``ring_size`` (default 1) runs in this process. With
    ``ring`` (a communicator or a transport) they are this rank's shards, and every rank makes the same call.

    Shapes: ``q`` [B, H, S, D], ``k`` [B, Hk, T, D], ``v`` [B, Hk, T, E], H a multiple of Hk (query head h reads
    key head h // (H // Hk)); with ``axes="bshd"`` the sequence comes before the heads. The result ``out``
    [B, H, S, E] has q's axes, dtype, library and device; with ``return_lse`` it is ``(out, lse)``, lse [B, H, S].
    Dtypes: float16, bfloat16, float32 or float64, one for all three. Sums and lse are kept in float32, or in
    float64 for float64.
    Units: lse is the natural log of the sum of exp(score) over visible keys. A query that sees no key gives
    out 0 and lse -inf.

    Keywords:
        causal: a query sees the keys at its own position and before.
        window: (left, right), how far a query sees to either side; None is unbounded, 0 is itself only. With
            ``causal`` a number w is (w - 1, 0).
        scale: what q.k is multiplied by; 1 / sqrt(D) if None.
        softcap: scores become softcap * tanh(score / softcap), before bias and mask.
        bias: added to the scores; broadcasts to [B, H, S, N], N all keys in global order. -inf hides a key.
        mask: bool, True = may attend; broadcasts likewise. With ``ring``, bias and mask hold this rank's rows. Or a
            function ``mask(q_positions, k_positions)`` of integer arrays [s, 1] and [1, t] in q's library, which
            answers for blocks of pairs with what broadcasts to [B, H, s, t], the same each time and on every rank. If
            it has ``interval(q_range, k_range)``, that says True or False of ranges of positions where it shows all
            pairs or none, so that it is not asked for them, and None elsewhere.
        query_offset: the position of q's first row, one for all or one per batch entry.
        key_lengths: for each batch entry how many keys exist; those from there on are hidden.
        documents: for each key's position the document that it is of, integers [N] or [B, N] on the host: a query
            sees keys of its own document alone. Or a `Documents`, which is made once for many calls.
        cu_seqlens: instead, where documents begin and end: 0, ..., N.
        sinks: [H], one score for each head that every query sees beside the keys, without a value: it takes its part
            in the sum of weights, and in lse. -inf is none.
        prefix: (k, v), keys and values [B, Hk, P, ...] that every rank has whole, in ``axes``; each counts once. Every
            query sees all of them, whatever the other keywords hide: bias and mask have no columns for them.
        alibi: [H], a slope for each head: slope * |q's position - k's position| is taken off the scores, as a bias that
            is made in blocks of a few million numbers. It has no gradient.
        dropout: the rate, from 0 to less than 1, at which finished weights become 0, and the others are divided by
            1 - dropout. lse stays what it is. Which ones is a function of dropout_seed, batch entry, head and positions
            alone: any ring, layout and library drops the same.
        dropout_seed: a whole number, the same on every rank; another one for each call drops others.
        layout: "contiguous", "zigzag", "striped" or a `Layout`: which rank holds which positions. "auto", without
            ``ring``, is the one with which the most loaded rank has the least work.
        q_layout, k_layout: the same for q (and out), and for k and v, where they differ.
        schedule: how k and v go around: "ring", from each rank to the next; "double", through the ranks of one machine
            and meanwhile on to the next machine, or a `DoubleRing` of as many ranks as you say; "bidirectional", half
            of each block to the next ranks and half to those before. Rows that few ranks read come straight from their
            owner in any of them, and blocks in memory that ranks share are read where they lie.
        partial: a `Partial` of these queries (on a ring, of this rank's), [B, H, S, ...] whatever ``axes`` says, over
            keys that they saw before: the call goes on from there. It stays as it is.
        return_partial: give a `Partial` instead of out: more keys can come, by ``partial`` or by `ringcore.merge`.
            Neither has gradients. Positions count from the first key of the call: a later chunk wants a smaller
            query_offset. Sinks and a prefix count in every call that is given them.
        reduce_replicated: for Torch, whose autograd makes gradients: those of sinks, of prefix and of a bias with one
            row, which are else this rank's share, are the sum over all ranks, the same on each.
        kernels: who computes, by name or object; None takes the best that is installed and able.

    Raises the errors of `ringcore.errors`, on every rank of a ring, before any tensor data is sent.
    Source: Liu, Zaharia and Abbeel 2023, arXiv:2310.01889, with the merge of `ringcore.merge`.
    """
    keywords: dict[str, Any] = {
        "ring": ring, "ring_size": ring_size, "causal": causal, "window": window, "scale": scale, "softcap": softcap,
        "query_offset": query_offset, "key_lengths": key_lengths, "documents": documents, "cu_seqlens": cu_seqlens,
        "layout": layout, "q_layout": q_layout, "k_layout": k_layout, "schedule": schedule, "axes": axes,
        "kernels": kernels,
        "dropout": dropout, "dropout_seed": dropout_seed, "reduce_replicated": reduce_replicated,
        "mask_of": mask if callable(mask) else None,
    }  # fmt: skip
    inputs = Inputs.of(q, k, v, bias, mask, sinks, prefix, alibi)
    return attend("ring_attention", inputs, return_lse, partial, return_partial, **keywords)


def attend(
    name: str, inputs: Inputs, return_lse: bool, partial: Partial | None = None, return_partial: bool = False,
    **keywords: Any,
) -> Any:  # fmt: skip
    """out, (out, lse) or a partial, of the function of this name.

    By the autograd of the arrays' library if it has one, which sees no partials.
    """
    adapter = autograd_adapter(type(inputs.q))
    if adapter is not None and partial is None and return_partial is False:
        found = sys.modules[adapter].attend(inputs, return_lse=return_lse, **keywords)
        if found is not NotImplemented:
            return found

    def further(arguments: Arguments) -> None:
        check_flag("return_lse", return_lse)
        check_partial(partial, return_partial, return_lse, arguments)
        if arguments.reduce_replicated and adapter is None:
            raise KeywordError(
                "reduce_replicated is about gradients, and ring_attention makes some for Torch's tensors alone. Call "
                "ring_attention_vjp with it."
            )

    call = Call(name, resumed=partial is not None, unfinished=return_partial is True, **keywords)
    prepared = call.prepare(inputs, further)
    if partial is not None:
        prepared.resume(partial)
    if return_partial:
        return prepared.partial()
    result = prepared.forward()
    out = swap_axes(result.out, call.axes)
    return (out, result.lse) if return_lse else out


def ring_attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    *,
    wrt: Sequence[str] = ("q", "k", "v"),
    ring: Any = None,
    ring_size: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    mask: Array | Mask | None = None,
    query_offset: int | Sequence[int] = 0,
    key_lengths: Sequence[int] | None = None,
    documents: Any = None,
    cu_seqlens: Any = None,
    sinks: Array | None = None,
    prefix: tuple[Array, Array] | None = None,
    alibi: Array | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    layout: str | Layout = "contiguous",
    q_layout: str | Layout | None = None,
    k_layout: str | Layout | None = None,
    schedule: Schedule = RING,
    axes: str = "bhsd",
    reduce_replicated: bool = False,
    kernels: Kernels | str | None = None,
) -> tuple[tuple[Array, Array], Pullback]:
    """Attention as `ring_attention`, with the function that turns gradients of its results into those of its inputs.

    Returns ``((out, lse), pullback)``; ``pullback(dout, dlse=None)`` gives one gradient for each name in ``wrt``
    (out of "q", "k", "v", "bias", "sinks", "prefix_k", "prefix_v"), in that order, each in its input's shape and dtype.
    dout has out's shape and dtype, dlse is [B, H, S] and stands for zeros if None. The pullback keeps references to the
    arrays that were given and to out: do not change them before it runs. On a ring every rank calls it, once or more.

    On a ring of processes the gradients of what every rank has whole (sinks, prefix, a bias with one row) are this
    rank's shares, which add up to the gradient; with ``reduce_replicated`` they are that sum, the same on every rank.
    """
    call = Call(
        "ring_attention_vjp", ring=ring, ring_size=ring_size, causal=causal, window=window, scale=scale,
        softcap=softcap, query_offset=query_offset, key_lengths=key_lengths, documents=documents,
        cu_seqlens=cu_seqlens, layout=layout, q_layout=q_layout, k_layout=k_layout, schedule=schedule, axes=axes,
        kernels=kernels, dropout=dropout, dropout_seed=dropout_seed, reduce_replicated=reduce_replicated,
        mask_of=mask if callable(mask) else None, gradient=True, wrt=wrt,
    )  # fmt: skip
    return with_pullback(call, Inputs.of(q, k, v, bias, mask, sinks, prefix, alibi))


def with_pullback(call: Call, inputs: Inputs) -> tuple[tuple[Array, Array], Pullback]:
    """The results of a call that is to have gradients, and the function that makes them."""
    prepared = call.prepare(inputs, lambda _: check_detached(PULLBACK, **inputs._asdict()))
    result = prepared.forward(keep_wide=True)
    out, lse, names = swap_axes(result.out, call.axes), result.lse, tuple(call.wrt)

    def pullback(dout: Array, dlse: Array | None = None) -> tuple[Array, ...]:
        prepared.session.check(lambda: check_output_gradients(dout, dlse, out, lse), "pullback")
        return prepared.backward(result, dout, dlse, names)

    return (out, lse), pullback
