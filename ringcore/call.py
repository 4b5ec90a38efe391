"""One call of attention: its keywords, and what runs once arrays are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import array_api_compat

from ringcore.agreement import Agreed, Note, agree, common_of
from ringcore.arguments import (
    Arguments,
    Inputs,
    check_arguments,
    check_array,
    check_detached,
    conversion,
    library_name,
    swap_axes,
    within_range,
)
from ringcore.arrays import put
from ringcore.discovery import choose_kernels, find_arithmetic, find_ring
from ringcore.documents import read_documents
from ringcore.errors import DeviceError, DtypeError, KeywordError, LayoutError, ShapeError, TransportError
from ringcore.grid import Grid, check_for_grid
from ringcore.grid_session import GridSession
from ringcore.integers import is_integer
from ringcore.layout import AUTO, Layout
from ringcore.partial import Partial, accumulation_dtype, dtype_name
from ringcore.positions import Mask, OfHeads
from ringcore.protocols import Kernels, Transport
from ringcore.replicated import add_all
from ringcore.routes import RING, DoubleRing, Schedule
from ringcore.session import LocalSession, ProcessSession, Session, Side, split_term
from ringcore.values import Array, Blocks, Tile, namespace
from ringcore.work import BackwardWork, ForwardWork, travels_narrow

Further = TypeVar("Further")

_KEPT = 64  # signatures that a call remembers
_PIECES = 256  # of a layout that is told by its text
_PLAIN = (type(None), bool, int, float, str, DoubleRing)
_known_of_ring: WeakKeyDictionary[Transport | Grid, dict[str, dict[Any, Known]]] = WeakKeyDictionary()
_TRAVEL = "whether gradients travel in a half type (the kernels decide: give the same kernels= on every rank)"
GRADIENTS = ("q", "k", "v", "bias", "sinks", "prefix_k", "prefix_v")


@dataclass(frozen=True)
class Call:
    """The keywords of one call, as they came; see `ringcore.ring_attention` for what they mean.

    name: the function that was called. resumed, unfinished: whether a partial is given, or asked for. gradient: whether
    gradients are wanted, those that ``wrt`` names.
    known: what calls like this one found out about arrays, by their signature; None looks for them by the keywords.
    """

    name: str
    ring: Any
    ring_size: int | None
    causal: bool
    window: tuple[int | None, int | None] | int | None
    scale: float | None
    softcap: float | None
    query_offset: int | Sequence[int]
    key_lengths: Sequence[int] | None
    layout: str | Layout
    axes: str
    kernels: Kernels | str | None
    documents: Any = None
    cu_seqlens: Any = None
    q_layout: str | Layout | None = None
    k_layout: str | Layout | None = None
    dropout: float = 0.0
    dropout_seed: int | None = None
    reduce_replicated: bool = False
    mask_of: Mask | None = None
    dilation: Any = None
    schedule: Schedule = RING
    resumed: bool = False
    unfinished: bool = False
    gradient: bool = False
    wrt: Any = ()
    known: dict[Any, Known] | None = field(default=None, repr=False, compare=False)

    def prepare(self, inputs: Inputs, further: Callable[[Arguments], None] = lambda arguments: None) -> Prepared:
        """Check everything that can be checked, on a ring together with the other ranks.

        ``further`` checks what came beside these arguments. Raises the errors of `ringcore.errors`.
        """
        if self.ring is None:
            known = self.about(self.remembered(None), inputs)
            arguments = known.arguments.about(inputs)
            further(arguments)
            if known.local is None:
                known.local = LocalSession(arguments, _check_ring_size(self.ring, self.ring_size))
            return Prepared(arguments, known.local, known.kernels)
        transport = find_ring(self.ring, like=inputs.q)
        remembered = self.remembered(find_ring(self.ring))

        def check() -> tuple[tuple[Arguments, Known], Note]:
            # Everything that can be wrong on one rank alone belongs here, where the others hear of it.
            known = self.about(remembered, inputs)
            arguments = known.arguments.about(inputs)
            further(arguments)
            if isinstance(transport, Grid):
                check_for_grid(arguments, transport)
            if transport.size > 1:
                transport.check(arguments.q, arguments.k, arguments.v)
                if arguments.schedule != RING and hasattr(transport, "check_schedule"):
                    transport.check_schedule(arguments.schedule, arguments.q)
                reserve = getattr(known.kernels, "reserve", None)
                if reserve is not None:
                    reserve(arguments.q, arguments.k, arguments.v, gradient=self.gradient)
            if known.common is None:
                wanted = sorted(self.wrt) if self.gradient else None
                ranks = transport.ring.size if isinstance(transport, Grid) else transport.size
                narrow = self.gradient and travels_narrow(arguments.k, known.kernels, ranks)
                alike: dict[str, Any] = {_TRAVEL: narrow}
                if isinstance(transport, Grid):  # where they are traded
                    alike |= {"whether partial is given": self.resumed, "return_partial": self.unfinished}
                known.common = common_of(self.name, arguments, wrt=wanted, **alike)
            return (arguments, known), Note(known.common, (arguments.q.shape[2], arguments.k.shape[2]))

        if getattr(transport, "capturing", bool)():
            # What a graph replays is what the ranks agreed on before; nothing of the host is in it.
            (arguments, known), _ = check()
            if len(known.agreed) != 1:
                raise TransportError(
                    "a call on a ring was captured in a graph, where the ranks cannot agree on it, and with arrays "
                    f"like these it ran with {len(known.agreed)} choices of lengths on the ranks before. Run it once "
                    "on every rank as it shall be captured, and with no others."
                )
            (agreed,) = known.agreed.values()
        else:
            (arguments, known), agreed = agree(transport, check)
            known.agree_on(agreed)
        session: Session
        if isinstance(transport, Grid):
            session = GridSession(transport, arguments, agreed)
        else:
            session = ProcessSession(transport, arguments, agreed)
        with session.guarded():
            return Prepared(arguments, session, known.kernels)

    def remembered(self, transport: Transport | Grid | None) -> dict[Any, Known]:
        """What calls with equal keywords on the same ring found out, as long as it lives."""
        if self.known is not None:
            return self.known
        keywords = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("ring", "known")}
        try:
            documents = read_documents(self.documents, self.cu_seqlens)
        except KeywordError:  # which the checks raise, where the other ranks hear of it
            return {}
        keywords |= {"documents": None if documents is None else documents.runs, "cu_seqlens": None}
        if not all(map(_plain, keywords.values())):
            return {}
        key = repr(keywords)  # in which 1, 1.0 and True differ
        if transport is None:
            return _known_alone(key)
        try:
            known = _known_of_ring.setdefault(transport, {})
        except TypeError:  # one of its own kind, that cannot be held weakly
            return {}
        if len(known) >= _KEPT:
            known.clear()
        return known.setdefault(key, {})

    def about(self, remembered: dict[Any, Known], inputs: Inputs) -> Known:
        """What holds for arrays of these types, shapes, dtypes and devices: found out once, if it is remembered."""
        try:
            signature = tuple(map(_signature, inputs))
            known = remembered.get(signature)
        except (AttributeError, TypeError):  # no arrays at all, perhaps: the checks say so
            signature, known = (), None
        if known is not None:
            if known.check_array is not None:
                known.check_array(inputs.q)
            return known
        arguments, kernels, _ = self.choose(inputs)
        known = Known(arguments.without_arrays(), kernels, _library_check(arguments.q))
        if signature and not getattr(kernels, "capturing", bool)():
            if len(remembered) >= _KEPT:
                remembered.clear()
            remembered[signature] = known
        return known

    def choose(self, inputs: Inputs) -> tuple[Arguments, Kernels, list[str]]:
        """The checked arguments, who computes, and why each one before was passed over; nothing is sent."""
        _check_ring_size(self.ring, self.ring_size)
        if self.ring is not None and self.layout == AUTO:
            raise LayoutError(
                'layout is "auto", but the shards were dealt before this call. Deal them with '
                "layout = ringcore.balanced(...), which is told of causal, window and documents, and give that layout."
            )
        arguments = check_arguments(
            inputs, causal=self.causal, window=self.window, scale=self.scale, softcap=self.softcap,
            dropout=self.dropout, dropout_seed=self.dropout_seed, query_offset=self.query_offset,
            key_lengths=self.key_lengths, documents=self.documents, cu_seqlens=self.cu_seqlens, layout=self.layout,
            q_layout=self.q_layout, k_layout=self.k_layout, axes=self.axes, reduce_replicated=self.reduce_replicated,
            mask_of=self.mask_of, dilation=self.dilation, schedule=self.schedule,
        )  # fmt: skip
        check_library = _library_check(arguments.q)
        if check_library is not None:
            check_library(arguments.q)
        needs = arguments.needs
        if self.gradient:
            _check_wrt(self.wrt, inputs)
            needs |= {"gradient", "bias_gradient"} if "bias" in self.wrt else {"gradient"}
        sharers = 1 if self.ring is None else find_ring(self.ring).sharers
        chosen, passed = choose_kernels(self.kernels, arguments.q, arguments.v, needs, sharers)
        return arguments, chosen, passed


@dataclass
class Known:
    """What a call found out about arrays of one signature; it holds none of them.

    check_array: what their library must still be asked about each one. local: where it runs without a ring of
    processes. common: what the ranks of a ring must have in common; agreed: what they agreed on, by their lengths.
    decoded: how far a cache was filled when it was last decoded.
    """

    arguments: Arguments
    kernels: Kernels
    check_array: Callable[[Array], None] | None = None
    local: LocalSession | None = None
    common: bytes | None = None
    agreed: dict[tuple[tuple[int, ...], tuple[int, ...]], Agreed] = field(default_factory=dict)
    decoded: Any = None

    def agree_on(self, agreed: Agreed) -> None:
        """Remember what the ranks agreed on."""
        if len(self.agreed) >= _KEPT:
            self.agreed.clear()
        self.agreed[agreed.q_lengths, agreed.k_lengths] = agreed


@dataclass(frozen=True)
class Result:
    """What forward found for the rows of this caller.

    out [B, H, S, E] in q's dtype, and ``wide``: the same before the last cast, where it was kept; maximum and total
    [B, H, S] of the finished rows.
    """

    out: Array
    wide: Array
    maximum: Array
    total: Array

    @property
    def lse(self) -> Array:
        """[B, H, S], natural log."""
        return Partial(self.wide, self.maximum, self.total).lse


class Prepared:
    """A checked call that can run: forward once, backward as often as one likes."""

    def __init__(self, arguments: Arguments, session: Session, kernels: Kernels) -> None:
        self.arguments, self.session, self._xp = arguments, session, namespace(arguments.q)
        deal = session.deal
        qs = [part for (part,) in session.split("q", (arguments.q,))]
        keys = session.split("k", (arguments.k, arguments.v))
        bias, sinks = (within_range(term, arguments.q) for term in (arguments.bias, arguments.sinks))
        terms = bias, arguments.mask
        biases, masks = (split_term(session, term, len(qs)) for term in terms)
        heads, key_heads = (session.heads(x.shape[1]) for x in (arguments.q, arguments.k))
        if arguments.mask_of is not None:
            some = heads.stop - heads.start < arguments.q.shape[1]
            masks = [OfHeads(arguments.mask_of, heads, arguments.q.shape[1]) if some else arguments.mask_of] * len(qs)
        prefix: Blocks | None = None
        tiles: list[tuple[Tile, ...]] = [()] * len(qs)
        if arguments.prefix_k is not None and arguments.prefix_v is not None:
            prefix = arguments.prefix_k[:, key_heads, ...], arguments.prefix_v[:, key_heads, ...]
            tiles = [deal.prefix_tiles(rank, arguments.prefix_k.shape[2]) for rank in session.ranks]
        alibi, sinks = (None if x is None else x[heads] for x in (arguments.alibi, sinks))
        score = replace(arguments.score, first_head=heads.start) if heads.start else arguments.score
        arithmetic = find_arithmetic(arguments.q)
        self._works = [
            ForwardWork(
                q, k, v, bias, mask, alibi=alibi, sinks=sinks, prefix=prefix, prefix_tiles=before,
                score=score, kernels=kernels, lengths=deal.k_layout.lengths, arithmetic=arithmetic,
            )
            for q, (k, v), bias, mask, before in zip(qs, keys, biases, masks, tiles, strict=True)
        ]  # fmt: skip

    def resume(self, partial: Partial) -> None:
        """Let forward begin with what these queries saw before; ``partial`` stays as it is."""
        wide = partial.widened
        with self.session.guarded():
            parts = self.session.split("q", (wide.weighted, wide.maximum, wide.total))
            for work, own in zip(self._works, parts, strict=True):
                work.resume(Partial(*(self._xp.asarray(x, copy=True) for x in own)))

    def forward(self, keep_wide: bool = False) -> Result:
        """Run the ring. keep_wide: ``wide`` of the result is in the accumulation dtype, which `backward` reads."""
        with self.session.guarded():
            return self._forward(keep_wide)

    def partial(self) -> Partial:
        """Run the ring; what these queries saw, before the division."""
        session = self.session
        with session.guarded():
            session.run(self._works)
            found = [work.partial() for work in self._works]
            weighted, maximum, total = session.join("q", [(x.weighted, x.maximum, x.total) for x in found])
            return Partial(weighted, maximum, total, self.arguments.score)

    def backward(self, result: Result, dout: Array, dlse: Array | None, wrt: Sequence[str]) -> tuple[Array, ...]:
        """The gradients of the names in ``wrt``, given those of out (caller's axes) and of lse."""
        with self.session.guarded():
            return self._backward(result, dout, dlse, wrt)

    def _forward(self, keep_wide: bool) -> Result:
        session, dtype = self.session, self.arguments.q.dtype
        session.run(self._works)
        kept = accumulation_dtype(self.arguments.q) if keep_wide else dtype
        wide, maximum, total = session.join("q", [work.finish(kept) for work in self._works])
        return Result(self._xp.astype(wide, dtype, copy=False), wide, maximum, total)

    def _backward(self, result: Result, dout: Array, dlse: Array | None, wrt: Sequence[str]) -> tuple[Array, ...]:
        arguments, session = self.arguments, self.session
        if session.anywhere(dlse is not None) and dlse is None:
            dlse = self._xp.zeros_like(result.maximum)  # others have one, and what is traded must be alike
        rows = (swap_axes(dout, arguments.axes), dlse, result.out, result.wide, result.maximum, result.total)
        backward: list[Any] = [
            BackwardWork(work, *cast(Any, parts), wanted=frozenset(wrt))
            for work, parts in zip(self._works, session.split("q", rows), strict=True)
        ]
        carried = session.run(backward)
        shares = {name: [work.replicated[name] for work in backward] for name in wrt if name in backward[0].replicated}
        of_rows = {"q": [work.dq for work in backward]} if "q" in wrt else {}
        if "bias" in wrt and arguments.bias is not None:
            of_bias = shares if arguments.bias.shape[2] == 1 else of_rows
            of_bias["bias"] = [work.dbias for work in backward]
        of_keys = [name for name in ("k", "v") if name in wrt]
        gradients = self._of_replicated(shares)
        gradients |= self._joined("q", list(of_rows), zip(*of_rows.values(), strict=True))
        gradients |= self._joined("k", of_keys, (blocks for blocks in carried if blocks is not None))
        return tuple(self._as_it_came(name, gradients[name]) for name in wrt)

    def _joined(self, side: Side, names: Sequence[str], parts: Iterable[Blocks]) -> dict[str, Array]:
        """The gradients of these names, from what each shard that ran here has of their rows."""
        if not names:
            return {}
        typed = [tuple(map(self._in_dtype, names, blocks)) for blocks in parts]
        return dict(zip(names, self.session.join(side, typed), strict=True))

    def _of_replicated(self, shares: dict[str, list[Array]]) -> dict[str, Array]:
        """The gradients of what every rank has whole: of this process's ranks, or of all if that is asked for."""
        sums = {name: add_all(shares[name]) for name in sorted(shares)}
        sums = {name: x if name == "bias" else self._of_all_heads(name, x) for name, x in sums.items()}
        if sums and self.arguments.reduce_replicated:
            sums = dict(zip(sums, self.session.sum_over_ranks(tuple(sums.values())), strict=True))
        return {name: self._in_dtype(name, total) for name, total in sums.items()}

    def _of_all_heads(self, name: str, share: Array) -> Array:
        """This rank's share of the gradient of ``name``, with 0 for heads that others compute."""
        like, axis = getattr(self.arguments, name), 0 if name == "sinks" else 1
        if share.shape == like.shape:
            return share
        whole = self._xp.zeros(like.shape, dtype=share.dtype, device=array_api_compat.device(share))
        return put(whole, (slice(None),) * axis + (self.session.heads(like.shape[axis]), ...), share)

    def _in_dtype(self, name: str, gradient: Array) -> Array:
        """The gradient in the dtype of its input."""
        like = getattr(self.arguments, name)
        return self._xp.astype(gradient, like.dtype, copy=False)

    def _as_it_came(self, name: str, gradient: Array) -> Array:
        """The gradient in the shape and axes in which its input was given."""
        if name == "bias":
            return self._xp.reshape(gradient, self.arguments.bias_shape)
        return gradient if name == "sinks" else swap_axes(gradient, self.arguments.axes)


@lru_cache(maxsize=256)
def _known_alone(key: str) -> dict[Any, Known]:
    """What calls without a ring of processes found out, by their keywords."""
    return {}


def _plain(x: Any) -> bool:
    """Whether x is all that its text says."""
    if type(x) is Layout:
        return sum(map(len, x.shards)) <= _PIECES
    return type(x) in _PLAIN or (type(x) in (tuple, list) and all(map(_plain, x)))


def _library_check(q: Array) -> Callable[[Array], None] | None:
    """What the library of q has to say about arrays, see `ringcore.Arithmetic`."""
    check: Callable[[Array], None] | None = getattr(find_arithmetic(q), "check_array", None)
    return check


def _signature(x: Any) -> Any:
    """All of an array that decides what may be done with it, but for its numbers and strides."""
    return None if x is None else (type(x), tuple(x.shape), x.dtype, _device(x), getattr(x, "layout", None))


def _device(x: Array) -> Any:
    """The device of x, as something that can be hashed: CuPy's cannot."""
    device = array_api_compat.device(x)
    return device if type(device).__hash__ is not None else str(device)


def check_output_gradients(dout: Array, dlse: Array | None, out: Array, lse: Array) -> None:
    """Raise unless dout and dlse have the library, device, shape and dtype of out and lse."""
    given = [("dout", dout, out)] if dlse is None else [("dout", dout, out), ("dlse", dlse, lse)]
    check_detached(dout=dout, dlse=dlse)
    for name, gradient, result in given:
        check_array(name, gradient)
        if (came := library_name(gradient)) != (due := library_name(result)):
            raise DeviceError(f"{name} is an array of {came}, but q one of {due}. {conversion(due, came)}")
        came, due = (str(array_api_compat.device(x)) for x in (gradient, result))
        if came != due:
            raise DeviceError(f"{name} is on the device {came}, but q on {due}. Move it there first.")
        if tuple(gradient.shape) != tuple(result.shape):
            raise ShapeError(
                f"{name} has shape {tuple(gradient.shape)}; it must be that of {name[1:]}, {tuple(result.shape)}."
            )
        if dtype_name(gradient) != dtype_name(result):
            raise DtypeError(f"{name} holds {dtype_name(gradient)}; it must be {name[1:]}'s {dtype_name(result)}.")


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


def _check_wrt(wrt: Sequence[str], inputs: Inputs) -> None:
    names = list(wrt) if isinstance(wrt, Sequence) and not isinstance(wrt, str) else []
    if not names or any(name not in GRADIENTS or names.count(name) > 1 for name in names):
        raise KeywordError(f"wrt is {wrt!r}; it must hold some of {', '.join(GRADIENTS)}, each once, in a tuple.")
    for name in names:
        if getattr(inputs, name) is None:
            given = name.partition("_")[0]
            raise KeywordError(f'wrt holds "{name}", but there is no {given}. Give {given}= or leave it out of wrt.')
