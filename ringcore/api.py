"""The public functions: exact attention over a ring, forward and with its pullback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import array_api_compat

from ringcore.agreement import Note, agree, note_of
from ringcore.arguments import Arguments, check_arguments, check_array, check_flag, is_integer, swap_axes, within_range
from ringcore.discovery import choose_kernels, find_transport, library
from ringcore.errors import DeviceError, DtypeError, KeywordError, ShapeError
from ringcore.layout import Layout
from ringcore.partial import Partial, accumulation_dtype, dtype_name
from ringcore.protocols import Kernels
from ringcore.ring import BackwardWork, ForwardWork
from ringcore.session import LocalSession, ProcessSession, Session, join_term, split_term
from ringcore.values import Array, namespace

_GRADIENTS = ("q", "k", "v", "bias")


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
    mask: Array | None = None,
    query_offset: int | Sequence[int] = 0,
    key_lengths: Sequence[int] | None = None,
    layout: str | Layout = "contiguous",
    axes: str = "bhsd",
    return_lse: bool = False,
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
        mask: bool, True = may attend; broadcasts likewise. With ``ring``, bias and mask hold this rank's rows.
        query_offset: the position of q's first row, one for all or one per batch entry.
        key_lengths: for each batch entry how many keys exist; those from there on are hidden.
        layout: "contiguous", "zigzag", "striped" or a `Layout`: which rank holds which positions.
        kernels: who computes, by name or object; None takes the best that is installed and able.

    Raises the errors of `ringcore.errors`, on every rank of a ring, before any tensor data is sent.
    Source: Liu, Zaharia and Abbeel 2023, arXiv:2310.01889, with the merge of `ringcore.merge`.
    """
    _, session, works, finish = _prepare(
        "ring_attention", ring, ring_size, kernels, frozenset(), (), return_lse,
        q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, bias=bias, mask=mask,
        query_offset=query_offset, key_lengths=key_lengths, layout=layout, axes=axes,
    )  # fmt: skip
    session.run(works)
    out, lse, _ = finish()
    return (out, lse) if return_lse else out


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
    mask: Array | None = None,
    query_offset: int | Sequence[int] = 0,
    key_lengths: Sequence[int] | None = None,
    layout: str | Layout = "contiguous",
    axes: str = "bhsd",
    kernels: Kernels | str | None = None,
) -> tuple[tuple[Array, Array], Pullback]:
    """Attention as `ring_attention`, with the function that turns gradients of its results into those of its inputs.

    Returns ``((out, lse), pullback)``; ``pullback(dout, dlse=None)`` gives one gradient for each name in ``wrt``
    (out of "q", "k", "v", "bias"), in that order, each in its input's shape and dtype. dout has out's shape and
    dtype, dlse is [B, H, S] and stands for zeros if None. The pullback keeps references to q, k, v, bias, mask and
    out: do not change them before it runs. On a ring every rank calls it, once or more.

    The gradient of a bias with one row is, on a ring of processes, this rank's share: add the ranks' shares.
    """
    arguments, session, works, finish = _prepare(
        "ring_attention_vjp", ring, ring_size, kernels, frozenset({"gradient"}), wrt, True,
        q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, bias=bias, mask=mask,
        query_offset=query_offset, key_lengths=key_lengths, layout=layout, axes=axes,
    )  # fmt: skip
    session.run(works)
    out, lse, statistics = finish()
    names = tuple(wrt)

    def pullback(dout: Array, dlse: Array | None = None) -> tuple[Array, ...]:
        session.check(lambda: _check_output_gradients(dout, dlse, out, lse), "pullback")
        return _pull_back(arguments, session, works, statistics, dout, dlse, names)

    return (out, lse), pullback


Statistics = list[tuple[Array, Array, Array]]
"""For each shard here what the pullback needs of its rows: out before the last cast, maximum and total."""


def _prepare(
    call: str, ring: Any, ring_size: int | None, kernels: Kernels | str | None, needs: frozenset[str],
    wrt: Sequence[str], with_lse: bool, q: Array, k: Array, v: Array, **keywords: Any,
) -> tuple[Arguments, Session, list[ForwardWork], Callable[[], tuple[Array, Array, Statistics]]]:  # fmt: skip
    """The checked arguments, where the call runs, its work, and how its results are made once it ran."""
    transport = None if ring is None else find_transport(ring)

    def check() -> tuple[tuple[Arguments, Kernels], Note]:
        # Everything that can be wrong on one rank alone belongs here, where the others hear of it.
        _check_ring_size(ring, ring_size)
        check_flag("return_lse", with_lse)
        arguments = check_arguments(q, k, v, **keywords)
        wanted = sorted(_check_wrt(wrt, arguments.bias)) if "gradient" in needs else None
        terms = {"bias": arguments.bias, "mask": arguments.mask, "softcap": arguments.score.softcap}
        needed = needs | {name for name, term in terms.items() if term is not None}
        sharers = 1 if transport is None else transport.sharers
        chosen, _ = choose_kernels(kernels, arguments.q, arguments.v, needed, sharers)
        if transport is not None and transport.size > 1:
            transport.check(arguments.q, arguments.k, arguments.v)
        return (arguments, chosen), note_of(call, arguments, wrt=wanted)

    session: Session
    if transport is None:
        (arguments, chosen), _ = check()
        session = LocalSession(arguments, _check_ring_size(ring, ring_size))
    else:
        (arguments, chosen), agreed = agree(transport, check)
        session = ProcessSession(transport, arguments, agreed)
    deal = session.deal
    qs, ks, vs = (
        session.split(x, layout)
        for x, layout in ((arguments.q, deal.q_layout), (arguments.k, deal.k_layout), (arguments.v, deal.k_layout))
    )
    terms = within_range(arguments.bias, arguments.q), arguments.mask
    biases, masks = (split_term(session, term, len(qs)) for term in terms)
    works = [
        ForwardWork(*parts, score=arguments.score, kernels=chosen, lengths=deal.k_layout.lengths)
        for parts in zip(qs, ks, vs, biases, masks, strict=True)
    ]

    def finish() -> tuple[Array, Array, Statistics]:
        partials = [work.take_result() for work in works]
        lse = session.join([partial.lse for partial in partials], deal.q_layout) if with_lse else None
        statistics = [(_normalised(partial), partial.maximum, partial.total) for partial in partials]
        xp, dtype = namespace(arguments.q), arguments.q.dtype
        out = session.join([xp.astype(wide, dtype, copy=False) for wide, _, _ in statistics], deal.q_layout)
        return swap_axes(out, arguments.axes), lse, statistics

    return arguments, session, works, finish


def _pull_back(
    arguments: Arguments, session: Session, works: Sequence[ForwardWork], statistics: Statistics,
    dout: Array, dlse: Array | None, wrt: tuple[str, ...],
) -> tuple[Array, ...]:  # fmt: skip
    xp = namespace(dout)
    deal, axes, wide = session.deal, arguments.axes, accumulation_dtype(arguments.q)
    douts = session.split(swap_axes(dout, axes), deal.q_layout)
    dlses = [None] * len(works) if dlse is None else session.split(dlse, deal.q_layout)
    backward = []
    for work, dout_part, dlse_part, (out, maximum, total) in zip(works, douts, dlses, statistics, strict=True):
        delta = xp.sum(out * xp.astype(dout_part, wide), axis=-1)
        delta = delta if dlse_part is None else delta - xp.astype(dlse_part, wide)
        backward.append(BackwardWork(dout_part, work, maximum, total, delta, frozenset(wrt)))
    carried = session.run(backward)
    gradients: dict[str, Array] = {}
    for place, home in enumerate(name for name in ("k", "v") if name in wrt):
        parts = [blocks[place] for blocks in carried if blocks is not None]
        gradients[home] = session.join(parts, deal.k_layout)
    if "q" in wrt:
        gradients["q"] = session.join([work.dq for work in backward], deal.q_layout)
    for name, like in (("q", arguments.q), ("k", arguments.k), ("v", arguments.v)):
        if name in wrt:
            gradients[name] = swap_axes(xp.astype(gradients[name], like.dtype, copy=False), axes)
    if "bias" in wrt and arguments.bias is not None:
        whole = join_term(session, [work.dbias for work in backward], arguments.bias)
        gradients["bias"] = xp.reshape(xp.astype(whole, arguments.bias.dtype, copy=False), arguments.bias_shape)
    return tuple(gradients[name] for name in wrt)


def _normalised(partial: Partial) -> Array:
    """The partial's out in its own dtype; the buffers of ``partial.weighted`` are used up."""
    xp = namespace(partial.weighted)
    out = xp.astype(partial.weighted, partial.total.dtype, copy=False)
    out /= xp.where(partial.seen, partial.total, 1.0)[..., None]
    return out


def _check_ring_size(ring: Any, ring_size: int | None) -> int:
    if ring_size is None:
        return 1
    if ring is not None:
        raise KeywordError(
            f"ring and ring_size={ring_size!r} came together: ring= splits over processes, ring_size= in this one. "
            "Give one."
        )
    if not is_integer(ring_size) or ring_size < 1:
        raise KeywordError(f"ring_size is {ring_size!r}; it must be a whole number of ranks, 1 or more.")
    return int(ring_size)


def _check_wrt(wrt: Sequence[str], bias: Array | None) -> list[str]:
    names = list(wrt) if isinstance(wrt, Sequence) and not isinstance(wrt, str) else []
    if not names or any(name not in _GRADIENTS or names.count(name) > 1 for name in names):
        raise KeywordError(f"wrt is {wrt!r}; it must hold some of {', '.join(_GRADIENTS)}, each once, in a tuple.")
    if "bias" in names and bias is None:
        raise KeywordError('wrt holds "bias", but there is no bias. Give bias= or leave it out of wrt.')
    return names


def _check_output_gradients(dout: Array, dlse: Array | None, out: Array, lse: Array) -> None:
    given = [("dout", dout, out)] if dlse is None else [("dout", dout, out), ("dlse", dlse, lse)]
    for name, gradient, result in given:
        check_array(name, gradient)
        if library(gradient) != library(result):
            raise DeviceError(
                f"{name} is an array of {library(gradient)}, but q one of {library(result)}. Convert it first, for "
                "example with that library's from_dlpack."
            )
        came, due = (str(array_api_compat.device(x)) for x in (gradient, result))
        if came != due:
            raise DeviceError(f"{name} is on the device {came}, but q on {due}. Move it there first.")
        if tuple(gradient.shape) != tuple(result.shape):
            raise ShapeError(
                f"{name} has shape {tuple(gradient.shape)}; it must be that of {name[1:]}, {tuple(result.shape)}."
            )
        if dtype_name(gradient) != dtype_name(result):
            raise DtypeError(f"{name} holds {dtype_name(gradient)}; it must be {name[1:]}'s {dtype_name(result)}.")
