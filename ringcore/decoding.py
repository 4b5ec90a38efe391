"""Attention of a few new queries, which every rank has, over keys that lie on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple, TypeAlias, cast

from ringcore.agreement import Note, agree, common_of, with_further
from ringcore.arguments import Arguments, check_columns
from ringcore.call import Call
from ringcore.discovery import find_arithmetic, find_transport
from ringcore.errors import KeywordError, LayoutError, TransportError
from ringcore.forward_work import ForwardWork
from ringcore.inputs import Inputs, check_detached, swap_axes, within_range
from ringcore.keywords import check_key_lengths, check_offsets
from ringcore.layout import AUTO, Layout, layout_of_lengths, resolve_layout
from ringcore.local import run_local
from ringcore.merge import fields
from ringcore.partial import Partial, dtype_name
from ringcore.partition import shard, unshard
from ringcore.protocols import Kernels, Reducing, Sharing, Transport
from ringcore.remembered import Known
from ringcore.ring import ring as ring_loop
from ringcore.schedule import query_plans, ring_plans, rows_moved
from ringcore.session import gathered, run_plans
from ringcore.tiling import Visibility, tiles_between
from ringcore.values import Array, Blocks, Plan, Tile, namespace
from ringcore.visiting_queries import QueryWork, partial_of

Found: TypeAlias = list[Partial | Array]
"""What rows of q saw, one part of them after the other: a partial, or all ranks' packed partials, stacked."""

_MOST = 1 << 24  # numbers of all ranks' partials at once
_EVERY = slice(None), slice(None), slice(None), ...
_NO_GRADIENTS = "decode_attention has no gradients. Give it detached, or call under torch.no_grad()"
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes


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
    q_layout: str | Layout | None = None,
    axes: str = "bhsd",
    kernels: Kernels | str | None = None,
) -> tuple[Array, Array]:
    """Attention of the last queries of sequences whose keys and values are dealt to the ranks of a ring.

    If every rank has all queries, nothing visits: each rank computes with its own keys, and the partials, a few numbers
    for each query and head, go to all, which merge them in the order of ranks. So every rank gets the same out and lse,
    bit for bit. If queries are dealt to the ranks too, either they visit and their partials are carried home, or k and
    v visit as in `ring_attention`: whichever moves fewer bytes, counted on the plans.

    Shapes: ``q`` [B, H, S, D], the same on every rank, or with ``q_layout`` and ``ring`` this rank's rows; ``k``
    [B, Hk, T, D] and ``v`` [B, Hk, T, E], with ``ring`` this rank's part of the cache, else all of it. Returns
    ``(out, lse)``, out like q with v's width, lse [B, H, S].

    Keywords:
        key_lengths: for each batch entry how many positions of the cache are filled, over all ranks; all if None. What
            the others hold is not read.
        query_offset: the position of q's first row, one for all or one per batch entry; None: q's rows are the last
            positions that are filled.
        layout: which rank holds which positions of the cache, of whose length the ranks' parts are together. "striped"
            deals each new position to the next rank, so that a cache grows evenly.
        q_layout: which rank holds which rows of q; None: every rank has all.
        causal: as in `ring_attention`, but True if not given: new queries see each other in order.
        ring, ring_size, window, scale, softcap, sinks, axes, kernels: as in `ring_attention`.

    It has no gradients. Raises the errors of `ringcore.errors`, on every rank, before any tensor data is sent.
    """
    # What changes from token to token is no part of the call, which remembers what it found out.
    call = Call(
        "decode_attention", ring=ring, ring_size=ring_size, causal=causal, window=window, scale=scale, softcap=softcap,
        query_offset=0, key_lengths=None, layout=layout, q_layout=q_layout, axes=axes, kernels=kernels,
    )  # fmt: skip
    inputs, filled = Inputs.of(q, k, v, sinks=sinks), Filled(key_lengths, query_offset)
    found = (_in_this_process if ring is None else _on_this_rank)(call, inputs, filled)
    parts = [_finished(part, q) for part in found]
    out, lse = parts[0] if len(parts) == 1 else (namespace(q).concat(x, axis=2) for x in zip(*parts, strict=True))
    return swap_axes(out, axes), lse


class Filled(NamedTuple):
    """How far the cache is filled, and where the queries are in it, as the caller said."""

    key_lengths: Any
    query_offset: Any

    def checked(self, batch: int) -> dict[str, Any]:
        """The same as `Arguments` have it, for so many batch entries; raises KeywordError."""
        offset = 0 if self.query_offset is None else self.query_offset
        lengths = None if self.key_lengths is None else check_key_lengths(self.key_lengths, batch)
        return {"offsets": check_offsets(offset, batch), "key_lengths": lengths}

    def visibility(self, arguments: Arguments, queries: int, keys: int) -> Visibility:
        """What each query sees, of so many queries and keys over all ranks."""
        check_columns(arguments, queries, keys)
        limits, offsets = arguments.key_lengths or (keys,) * len(arguments.offsets), arguments.offsets
        if self.query_offset is None:
            offsets = tuple(limit - queries for limit in limits)
            if min(offsets, default=0) < 0:
                raise KeywordError(
                    f"q has {queries} rows, but batch entry {offsets.index(min(offsets))} has {min(limits)} keys, its "
                    "own among them. Write the keys of new positions before they are asked for, or give query_offset."
                )
        return Visibility(
            causal=arguments.causal, window=arguments.window, offsets=offsets, key_limits=limits,
            heads=arguments.q.shape[1], key_heads=arguments.k.shape[1],
        )  # fmt: skip


def _in_this_process(call: Call, inputs: Inputs, filled: Filled) -> Found:
    known, arguments = _checked(call, call.remembered(None), inputs, filled)
    kernels = known.kernels
    (queries, keys), size = (x.shape[2] for x in (arguments.q, arguments.k)), call.ring_size or 1
    k_layout = resolve_layout(arguments.k_layout, keys, size, "k")
    q_layout = None if call.q_layout is None else resolve_layout(call.q_layout, queries, size, "q")
    seen = filled.visibility(arguments, queries, keys)
    ks, vs = ([shard(x, k_layout, rank, size) for rank in range(size)] for x in (arguments.k, arguments.v))
    if q_layout is None:
        every = (_own(arguments, kernels, ks[rank], vs[rank], k_layout, seen, rank) for rank in range(size))
        return [_unpacked(reduce(_merge_packed, map(_packed, every))) if size > 1 else next(every)]
    plans, make = _travels(arguments, kernels, q_layout, k_layout, seen)
    works = [make(shard(arguments.q, q_layout, rank, size), ks[rank], vs[rank]) for rank in range(size)]
    came = run_local([ring_loop(plan, work) for plan, work in zip(plans, works, strict=True)])
    found = [fields(_seen(work, home)) for work, home in zip(works, came, strict=True)]
    return [Partial(*(unshard(parts, q_layout) for parts in zip(*found, strict=True)))]


def _in_rows(own: Partial, ranks: int) -> list[Partial]:
    """Parts of its rows, of which those of all ranks together are of bounded size."""
    batch, heads, rows, width = own.weighted.shape
    step = max(1, _MOST // (max(1, ranks * batch * heads) * (width + 2)))
    if step >= rows or ranks == 1:
        return [own]
    return [Partial(*(x[:, :, n : n + step, ...] for x in fields(own))) for n in range(0, rows, step)]


def _finished(found: Partial | Array, q: Array) -> tuple[Array, Array]:
    """out and lse of a partial, or of all ranks' packed partials, stacked."""
    arithmetic: Any = find_arithmetic(q)
    if not isinstance(found, Partial):
        at_once = getattr(arithmetic, "finished_packed", None)
        done: tuple[Array, Array] | None = None if at_once is None else at_once(found, q.dtype)
        if done is not None:
            return done
        found = _unpacked(reduce(_merge_packed, (found[rank, ...] for rank in range(found.shape[0]))))
    out, maximum, total = arithmetic.finished(found, q.dtype)
    if out.dtype == found.total.dtype:
        out = namespace(q).asarray(out, copy=True)  # without what travelled beside it
    return out, arithmetic.finished_lse(maximum, total, -math.inf)


def _on_this_rank(call: Call, inputs: Inputs, filled: Filled) -> Found:
    transport = find_transport(call.ring, like=inputs.q)
    remembered = call.remembered(find_transport(call.ring))

    def check() -> tuple[tuple[Arguments, Kernels, Known], Note]:
        known, arguments = _checked(call, remembered, inputs, filled)
        if transport.size > 1:
            transport.check(arguments.q, arguments.k, arguments.v)
        if known.common is None:
            known.common = common_of(call.name, known.arguments.about(inputs))
        rows, keys = arguments.q.shape[2], arguments.k.shape[2]
        # These change from token to token.
        further: dict[str, Any] = {
            "key_lengths": arguments.key_lengths,
            "query_offset": None if filled.query_offset is None else arguments.offsets,
            "rows of q, which every rank must have": rows if call.q_layout is None else "dealt",
        }  # fmt: skip
        return (arguments, known.kernels, known), Note(with_further(known.common, **further), (rows, keys))

    if getattr(transport, "capturing", bool)():
        # What a graph replays is what the ranks agreed on before.
        known, arguments = _checked(call, remembered, inputs, filled)
        if known.decoded != (arguments.key_lengths, arguments.offsets, filled.query_offset is None) or (
            len(known.agreed) != 1
        ):
            raise TransportError(
                "decode_attention on a ring was captured in a graph, where the ranks cannot agree on it, and it is not "
                "what they last agreed on for arrays like these, or that was on several choices of lengths. Run it "
                "once on every rank as it shall be captured, and with no others; a layout of many pieces, or kernels "
                "that are an object, cannot be captured."
            )
        kernels, (agreed,) = known.kernels, known.agreed.values()
    else:
        (arguments, kernels, known), agreed = agree(transport, check)
        known.decoded = arguments.key_lengths, arguments.offsets, filled.query_offset is None
        known.agree_on(agreed)
    k_layout = _dealt(arguments.k_layout, agreed.k_lengths, "k")
    q_layout = None if call.q_layout is None else _dealt(call.q_layout, agreed.q_lengths, "q")
    queries = arguments.q.shape[2] if q_layout is None else q_layout.length
    seen = filled.visibility(arguments, queries, k_layout.length)
    try:
        if q_layout is None:
            own = _own(arguments, kernels, arguments.k, arguments.v, k_layout, seen, transport.rank)
            return [_merged(transport, part) for part in _in_rows(own, transport.size)]
        plans, make = _travels(arguments, kernels, q_layout, k_layout, seen)
        work = make(arguments.q, arguments.k, arguments.v)
        return [_seen(work, run_plans(transport, plans, work))]
    except BaseException as error:  # such as too little memory, for which the others would wait
        transport.abort(error)
        raise


def _merged(transport: Transport, own: Partial) -> Partial | Array:
    """All ranks' partials as one, by a reduction where the transport has any; else all of them, packed and stacked."""
    if transport.size == 1:
        return own
    packed = _packed(own)
    if hasattr(transport, "reduce"):
        came = cast(Reducing, transport).reduce(packed, _merge_packed)
        if came is not None:
            return _unpacked(came)
    stacked = cast(Sharing, transport).shares(packed) if hasattr(transport, "shares") else None
    if stacked is None:
        stacked = namespace(packed).stack([part for (part,) in gathered(transport, (packed,))])
    return stacked


def _merge_packed(lower: Array, upper: Array) -> Array:
    """Both merged, in the memory of ``upper`` where the library allows it."""
    state, part = _unpacked(upper), _unpacked(lower)
    merged = find_arithmetic(upper).merge_rows(state, _EVERY, part)
    return upper if merged.weighted is state.weighted else _packed(merged)


def _packed(partial: Partial) -> Array:
    """[B, H, S, E + 2]: weighted, maximum and total."""
    xp = namespace(partial.weighted)
    return xp.concat([partial.weighted, partial.maximum[..., None], partial.total[..., None]], axis=-1)


def _unpacked(x: Array) -> Partial:
    return Partial(x[..., :-2], x[..., -2], x[..., -1])


def _checked(call: Call, remembered: dict[Any, Known], inputs: Inputs, filled: Filled) -> tuple[Known, Arguments]:
    for name, layout in (("layout", call.layout), ("q_layout", call.q_layout)):
        if layout == AUTO:
            raise LayoutError(f'{name} is "auto", but a cache lies where it was written. Give the layout that it has.')
    known = call.about(remembered, inputs)
    check_detached(_NO_GRADIENTS, q=inputs.q, k=inputs.k, v=inputs.v, sinks=inputs.sinks)
    return known, known.arguments.about(inputs, **filled.checked(len(known.arguments.offsets)))


@lru_cache(maxsize=64)
def _dealt(layout: str | Layout, lengths: tuple[int, ...], what: str) -> Layout:
    return layout_of_lengths(layout, lengths, what)


@lru_cache(maxsize=64)
def _tiles(queries: int, shard: tuple[range, ...], seen: Visibility) -> tuple[Tile, ...]:
    """What so many queries see of a shard: the same in all layers of a model."""
    return tiles_between((range(queries),), shard, seen)


def _own(
    arguments: Arguments, kernels: Kernels, k: Array, v: Array, layout: Layout, seen: Visibility, rank: int
) -> Partial:
    """What all of q sees of the keys of one rank; the sinks are the first one's."""
    q = arguments.q
    sinks = within_range(arguments.sinks, q) if rank == 0 else None
    work = ForwardWork(
        q, k, v, None, None, sinks=sinks, score=arguments.score, kernels=kernels, lengths=layout.lengths,
        arithmetic=find_arithmetic(q),
    )  # fmt: skip
    work.visit((k, v), _tiles(q.shape[2], layout.shards[rank], seen))
    return work.partial()


def _travels(
    arguments: Arguments, kernels: Kernels, q_layout: Layout, k_layout: Layout, seen: Visibility
) -> tuple[tuple[Plan, ...], Callable[[Array, Array, Array], ForwardWork | QueryWork]]:
    """The plans that move fewer bytes, of visiting keys and of visiting queries, and what makes their work."""
    q, k, v = arguments.q, arguments.k, arguments.v
    of_keys, of_queries = ring_plans(q_layout, k_layout, seen), query_plans(q_layout, k_layout, seen)
    sinks = within_range(arguments.sinks, q)
    shared: dict[str, Any] = {
        "score": arguments.score, "kernels": kernels, "arithmetic": find_arithmetic(q),
    }  # fmt: skip
    if bytes_of_queries(of_queries, q_layout, q, v) < bytes_of_keys(of_keys, k_layout, k, v):
        return of_queries, lambda q, k, v: QueryWork(q, k, v, sinks, lengths=q_layout.lengths, **shared)
    return of_keys, lambda q, k, v: ForwardWork(q, k, v, None, None, sinks=sinks, lengths=k_layout.lengths, **shared)


def bytes_of_keys(plans: Sequence[Plan], layout: Layout, k: Array, v: Array) -> int:
    """What all ranks send where k and v visit: Hk (D + E) numbers for each row that a plan moves."""
    visiting, _ = rows_moved(plans, layout)
    batch, heads, _, width = map(int, k.shape)
    return visiting * batch * heads * (width + int(v.shape[3])) * _SIZES[dtype_name(k)]


def bytes_of_queries(plans: Sequence[Plan], layout: Layout, q: Array, v: Array) -> int:
    """What all ranks send where q visits: H D numbers for each row, and H (E + 2) of each partial that is carried."""
    visiting, carried = rows_moved(plans, layout)
    batch, heads, _, width = map(int, q.shape)
    size = _SIZES[dtype_name(q)]
    return batch * heads * (visiting * width * size + carried * (int(v.shape[3]) + 2) * max(4, size))


def _seen(work: ForwardWork | QueryWork, home: Blocks | None) -> Partial:
    """What the rows of a rank saw, once its part in the ring is done."""
    return partial_of(home or ()) if isinstance(work, QueryWork) else work.partial()
