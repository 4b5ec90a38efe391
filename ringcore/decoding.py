"""Attention of a few new queries, which every rank has, over keys that lie on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from ringcore.agreement import Note, agree, common_of
from ringcore.arguments import Arguments, Inputs, check_columns, check_detached, swap_axes, within_range
from ringcore.call import Call
from ringcore.discovery import find_arithmetic, find_transport
from ringcore.errors import KeywordError, LayoutError, TransportError
from ringcore.layout import AUTO, Layout, layout_of_lengths, resolve_layout
from ringcore.merge import merge
from ringcore.partial import Partial
from ringcore.partition import shard
from ringcore.protocols import Kernels, Reducing, Transport
from ringcore.session import gathered
from ringcore.tiling import Visibility, tiles_between
from ringcore.values import Array, namespace
from ringcore.work import ForwardWork


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    ring: Any = None,
    ring_size: int | None = None,
    key_lengths: Sequence[int] | None = None,
    query_offset: int | Sequence[int] | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    layout: str | Layout = "contiguous",
    axes: str = "bhsd",
    kernels: Kernels | str | None = None,
) -> tuple[Array, Array]:
    """Attention of the last queries of sequences whose keys and values are dealt to the ranks of a ring.

    Nothing visits: each rank computes with its own keys, and the partials, a few numbers for each query and head, go to
    all, which merge them in the order of ranks. So every rank gets the same out and lse, bit for bit.

    Shapes: ``q`` [B, H, S, D], the same on every rank; ``k`` [B, Hk, T, D] and ``v`` [B, Hk, T, E], with ``ring`` this
    rank's part of the cache, else all of it. Returns ``(out, lse)``, out like q with v's width, lse [B, H, S].

    Keywords:
        key_lengths: for each batch entry how many positions of the cache are filled, over all ranks; all if None. What
            the others hold is not read.
        query_offset: the position of q's first row, one for all or one per batch entry; None: q's rows are the last
            positions that are filled.
        layout: which rank holds which positions of the cache, of whose length the ranks' parts are together. "striped"
            deals each new position to the next rank, so that a cache grows evenly.
        causal: as in `ring_attention`, but True if not given: new queries see each other in order.
        ring, ring_size, window, scale, softcap, sinks, axes, kernels: as in `ring_attention`.

    It has no gradients. Raises the errors of `ringcore.errors`, on every rank, before any tensor data is sent.
    """
    call = Call(
        "decode_attention", ring=ring, ring_size=ring_size, causal=causal, window=window, scale=scale, softcap=softcap,
        query_offset=0 if query_offset is None else query_offset, key_lengths=key_lengths, layout=layout, axes=axes,
        kernels=kernels,
    )  # fmt: skip
    inputs, last = Inputs.of(q, k, v, sinks=sinks), query_offset is None
    whole = _in_this_process(call, inputs, last) if ring is None else _on_this_rank(call, inputs, last)
    xp = namespace(q)
    return swap_axes(xp.astype(whole.out, q.dtype, copy=False), axes), whole.lse


def _in_this_process(call: Call, inputs: Inputs, last: bool) -> Partial:
    arguments, kernels = _checked(call, inputs)
    keys, size = arguments.k.shape[2], call.ring_size or 1
    layout = resolve_layout(arguments.k_layout, keys, size, "k")
    seen = _visibility(arguments, keys, last)

    def partial(rank: int) -> Partial:
        k, v = (shard(x, layout, rank, size) for x in (arguments.k, arguments.v))
        return _partial(arguments, kernels, k, v, layout, seen, rank)

    return reduce(merge, map(partial, range(size)))


def _on_this_rank(call: Call, inputs: Inputs, last: bool) -> Partial:
    transport = find_transport(call.ring, like=inputs.q)
    if getattr(transport, "capturing", bool)():
        raise TransportError("decode_attention on a ring cannot be captured in a graph: the ranks agree on each call.")

    def check() -> tuple[tuple[Arguments, Kernels], Note]:
        arguments, kernels = _checked(call, inputs)
        if transport.size > 1:
            transport.check(arguments.q, arguments.k, arguments.v)
        rows, keys = arguments.q.shape[2], arguments.k.shape[2]
        further = {"rows of q, which every rank must have": rows, "whether query_offset is given": not last}
        return (arguments, kernels), Note(common_of(call.name, arguments, **further), (rows, keys))

    (arguments, kernels), agreed = agree(transport, check)
    layout = layout_of_lengths(arguments.k_layout, agreed.k_lengths, "k")
    seen = _visibility(arguments, sum(agreed.k_lengths), last)
    try:
        return _merged(transport, _partial(arguments, kernels, arguments.k, arguments.v, layout, seen, transport.rank))
    except BaseException as error:  # such as too little memory, for which the others would wait
        transport.abort(error)
        raise


def _merged(transport: Transport, own: Partial) -> Partial:
    """All ranks' partials as one: by a reduction, where the transport has any, else each rank merges all of them."""
    if transport.size > 1 and isinstance(transport, Reducing):
        came = transport.reduce(_packed(own), lambda lower, upper: _packed(merge(_unpacked(lower), _unpacked(upper))))
        if came is not None:
            return _unpacked(came)
    parts = gathered(transport, (own.weighted, own.maximum, own.total))
    return reduce(merge, (Partial(*part) for part in parts))


def _packed(partial: Partial) -> Array:
    """[B, H, S, E + 2]: weighted, maximum and total."""
    xp = namespace(partial.weighted)
    return xp.concat([partial.weighted, partial.maximum[..., None], partial.total[..., None]], axis=-1)


def _unpacked(x: Array) -> Partial:
    return Partial(x[..., :-2], x[..., -2], x[..., -1])


def _checked(call: Call, inputs: Inputs) -> tuple[Arguments, Kernels]:
    if call.layout == AUTO:
        raise LayoutError('layout is "auto", but a cache lies where it was written. Give the layout that it has.')
    arguments, kernels, _ = call.choose(inputs)
    check_detached(q=inputs.q, k=inputs.k, v=inputs.v, sinks=inputs.sinks)
    return arguments, kernels


def _visibility(arguments: Arguments, keys: int, last: bool) -> Visibility:
    """What each query sees; ``last``: q's rows are the last of the positions that are filled."""
    rows, batch = arguments.q.shape[2], len(arguments.offsets)
    limits = arguments.key_lengths or (keys,) * batch
    check_columns(arguments, rows, keys)
    offsets = tuple(limit - rows for limit in limits) if last else arguments.offsets
    if last and min(offsets, default=0) < 0:
        raise KeywordError(
            f"q has {rows} rows, but batch entry {offsets.index(min(offsets))} has {min(limits)} keys, its own among "
            "them. Write the keys of new positions before they are asked for, or give query_offset."
        )
    return Visibility(
        causal=arguments.causal, window=arguments.window, offsets=offsets, key_limits=limits,
        heads=arguments.q.shape[1], key_heads=arguments.k.shape[1],
    )  # fmt: skip


def _partial(
    arguments: Arguments, kernels: Kernels, k: Array, v: Array, layout: Layout, seen: Visibility, rank: int
) -> Partial:
    """What q sees of the keys of one rank; the sinks are the first one's."""
    q = arguments.q
    sinks = within_range(arguments.sinks, q) if rank == 0 else None
    work = ForwardWork(
        q, k, v, None, None, sinks=sinks, score=arguments.score, kernels=kernels, lengths=layout.lengths,
        arithmetic=find_arithmetic(q),
    )  # fmt: skip
    work.visit((k, v), tiles_between((range(q.shape[2]),), layout.shards[rank], seen))
    return work.partial()
