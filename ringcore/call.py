"""One call of attention: its keywords, and what runs once arrays are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import array_api_compat

from ringcore.agreement import Note, agree, common_of
from ringcore.arguments import Arguments, check_arguments
from ringcore.backward_work import travels_narrow
from ringcore.discovery import choose_kernels, find_arithmetic, find_ring
from ringcore.documents import read_documents
from ringcore.errors import DeviceError, DtypeError, KeywordError, LayoutError, ShapeError, TransportError
from ringcore.grid import Grid, check_for_grid
from ringcore.grid_session import GridSession
from ringcore.inputs import PULLBACK, Inputs, check_array, check_detached, check_slopes, conversion, library_name
from ringcore.integers import is_integer
from ringcore.layout import AUTO, Layout
from ringcore.partial import dtype_name
from ringcore.positions import Mask
from ringcore.prepared import Prepared
from ringcore.protocols import Kernels, Transport
from ringcore.remembered import Known, Memory, keep, memory_of, signature_of
from ringcore.routes import RING, Schedule
from ringcore.session import LocalSession, ProcessSession, Session
from ringcore.values import Array

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
    known: Memory | None = field(default=None, repr=False, compare=False)

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

    def remembered(self, transport: Transport | Grid | None) -> Memory:
        """What calls with equal keywords on the same ring found out, as long as it lives."""
        if self.known is not None:
            return self.known
        keywords = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("ring", "known")}
        try:
            documents = read_documents(self.documents, self.cu_seqlens)
        except KeywordError:  # which the checks raise, where the other ranks hear of it
            return {}
        keywords |= {"documents": None if documents is None else documents.runs, "cu_seqlens": None}
        return memory_of(keywords, transport)

    def about(self, remembered: Memory, inputs: Inputs) -> Known:
        """What holds for arrays of these types, shapes, dtypes and devices: found out once, if it is remembered."""
        signature = signature_of(inputs)
        known = remembered.get(signature) if signature else None
        if known is not None:
            check_slopes(inputs.alibi)
            if known.check_array is not None:
                known.check_array(inputs.q)
            return known
        arguments, kernels, _ = self.choose(inputs)
        known = Known(arguments.without_arrays(), kernels, _library_check(arguments.q))
        if signature and not getattr(kernels, "capturing", bool)():
            keep(remembered, signature, known)
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


def _library_check(q: Array) -> Callable[[Array], None] | None:
    """What the library of q has to say about arrays, see `ringcore.Arithmetic`."""
    check: Callable[[Array], None] | None = getattr(find_arithmetic(q), "check_array", None)
    return check


def check_output_gradients(dout: Array, dlse: Array | None, out: Array, lse: Array) -> None:
    """Raise unless dout and dlse have the library, device, shape and dtype of out and lse."""
    given = [("dout", dout, out)] if dlse is None else [("dout", dout, out), ("dlse", dlse, lse)]
    check_detached(PULLBACK, dout=dout, dlse=dlse)
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
