"""Why a call runs as it does: who computes, why nobody better, and how blocks travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ringcore.arguments import Arguments
from ringcore.call import Call
from ringcore.discovery import find_ring
from ringcore.grid import Grid, check_for_grid
from ringcore.inputs import Inputs
from ringcore.keywords import check_flag
from ringcore.layout import AUTO, Layout
from ringcore.partial import Partial
from ringcore.positions import NUMBERS, SIDE, Mask
from ringcore.protocols import Kernels, Members
from ringcore.resumption import check_partial
from ringcore.routes import RING, Schedule
from ringcore.session import LocalSession
from ringcore.values import Array


@dataclass(frozen=True)
class Explanation:
    """Why a call runs as it does; ``str`` of it gives one fact a line.

    kernels: the name of those that compute. passed: "name: why not" of each that was passed over before them.
    ring: where the ranks are and how blocks travel. layout: its name, or that of q's and that of k's and v's. costs:
    what some of the keywords cost.
    """

    kernels: str
    passed: tuple[str, ...]
    ring: str
    layout: str
    costs: tuple[str, ...] = ()

    def __str__(self) -> str:
        facts = [("kernels", self.kernels), *(("", f"not {reason}") for reason in self.passed)]
        facts += [("ring", self.ring), ("layout", self.layout)]
        facts += [("costs" if place == 0 else "", cost) for place, cost in enumerate(self.costs)]
        return "\n".join(f"{name:<9}{fact}" for name, fact in facts)


def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    wrt: Sequence[str] = (),
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
    layout: str | Layout = "contiguous",
    documents: Any = None,
    cu_seqlens: Any = None,
    sinks: Array | None = None,
    prefix: tuple[Array, Array] | None = None,
    alibi: Array | None = None,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    q_layout: str | Layout | None = None,
    k_layout: str | Layout | None = None,
    schedule: Schedule = RING,
    axes: str = "bhsd",
    return_lse: bool = False,
    partial: Partial | None = None,
    return_partial: bool = False,
    reduce_replicated: bool = False,
    kernels: Kernels | str | None = None,
) -> Explanation:
    """Which kernels `ring_attention` would use with these arguments, why not others, and how blocks would travel.

    No attention is computed and nothing is sent, with two exceptions that the call itself would make: fused kernels
    that were never used for such arrays are tried on a small tile; and making the ring of a communicator or process
    group is collective, so that the first time every rank must be here. What only the ranks together can find wrong,
    such as lengths that do not fit the layout, is not looked for.

    Shapes and dtypes: as for `ring_attention`; the numbers in the arrays do not matter.
    wrt: of which inputs gradients will be wanted, as for `ring_attention_vjp`; where it is empty, of those tensors
        that require grad. Torch's autocast is not applied: give tensors of the dtype that it would convert to.

    Raises the errors of `ringcore.errors` that this rank's arguments alone give, UnsupportedError for kernels that
    were asked for and cannot do the call.
    """
    check_flag("return_lse", return_lse)
    inputs = Inputs.of(q, k, v, bias, mask, sinks, prefix, alibi)
    recorded = (name for name, x in inputs._asdict().items() if getattr(x, "requires_grad", False) is True)
    wrt = wrt or tuple(recorded)
    call = Call(
        "explain", ring=ring, ring_size=ring_size, causal=causal, window=window, scale=scale, softcap=softcap,
        query_offset=query_offset, key_lengths=key_lengths, documents=documents, cu_seqlens=cu_seqlens,
        layout=layout, q_layout=q_layout, k_layout=k_layout, schedule=schedule, axes=axes, kernels=kernels,
        dropout=dropout, dropout_seed=dropout_seed, reduce_replicated=reduce_replicated,
        mask_of=mask if callable(mask) else None, gradient=bool(wrt), wrt=wrt,
    )  # fmt: skip
    arguments, chosen, passed = call.choose(inputs)
    check_partial(partial, return_partial, return_lse, arguments)
    layouts = arguments.q_layout, arguments.k_layout
    if AUTO in layouts:
        deal = LocalSession(arguments, ring_size or 1).deal
        layouts = deal.q_layout, deal.k_layout
    where = f"local ring of {ring_size or 1} rank(s), all in this process"
    if ring is not None:
        transport = find_ring(ring, like=arguments.q)
        if isinstance(transport, Grid):
            check_for_grid(arguments, transport)
        elif schedule != RING and hasattr(transport, "check_schedule"):
            transport.check_schedule(schedule, arguments.q)
        if transport.size > 1:
            transport.check(arguments.q, arguments.k, arguments.v)
        where = transport_words(transport)
    if schedule != RING:
        where += f"; schedule {schedule!r}"
    return Explanation(
        chosen.capabilities.name, tuple(passed), where, _layout_words(*layouts),
        tuple(_costs(arguments)),
    )  # fmt: skip


def _costs(arguments: Arguments) -> Iterator[str]:
    if arguments.mask_of is not None:
        yield f"mask: the function is asked for blocks of {SIDE:,} x {SIDE:,} pairs, forward and again backward"
    if arguments.alibi is not None:
        yield f"alibi: a bias that is made for blocks of {NUMBERS:,} numbers, forward and again backward"
    if arguments.score.dropout:
        yield "dropout: no library's fused kernel draws it; ours draw for each pair, forward and again backward"


def _layout_words(*layouts: str | Layout) -> str:
    of_q, of_k = (layout if isinstance(layout, str) else layout.name for layout in layouts)
    return of_q if of_q == of_k else f"{of_q} for q, {of_k} for k and v"


def transport_words(transport: Members) -> str:
    """How blocks travel, in the transport's own words if it has some."""
    return str(getattr(transport, "explain", type(transport).__name__))
