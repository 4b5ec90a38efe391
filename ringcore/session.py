"""Where a call runs: all ranks in this process, or this rank of a ring of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, Protocol, TypeAlias, cast

from ringcore.agreement import Agreed, Note, agree
from ringcore.arguments import Arguments, check_columns
from ringcore.balance import lightest
from ringcore.exchange import InPlace, run_rank
from ringcore.layout import AUTO, Layout, layout_of_lengths, of_groups, resolve_layout
from ringcore.local import run_local
from ringcore.partition import shard, unshard
from ringcore.protocols import Members, OneSided, Transport
from ringcore.replicated import GatherWork, add_all, gather_plans
from ringcore.ring import Work, ring
from ringcore.routes import RING, Schedule, resolve_schedule, scheduled_plans
from ringcore.tiling import Visibility, tiles_between
from ringcore.values import Array, Blocks, Move, Plan, Tile

Side: TypeAlias = Literal["q", "k"]
"""Whose rows: q's, or those of k and v."""


@dataclass(frozen=True)
class Deal:
    """How q and k are dealt to the ranks, and every rank's plan."""

    q_layout: Layout
    k_layout: Layout
    visibility: Visibility
    plans: tuple[Plan, ...]

    @classmethod
    def of(cls, q_layout: Layout, k_layout: Layout, visibility: Visibility, schedule: Schedule = RING) -> Deal:
        """By these layouts."""
        return cls(q_layout, k_layout, visibility, scheduled_plans(q_layout, k_layout, visibility, schedule))

    def layout(self, side: Side) -> Layout:
        """That of q's rows, or of k's and v's."""
        return self.q_layout if side == "q" else self.k_layout

    def prefix_tiles(self, rank: int, length: int) -> tuple[Tile, ...]:
        """All of a rank's queries before so many keys that all ranks have, at positions before the first."""
        return _prefix_tiles(self.q_layout.shards[rank], length, self.visibility)


class Session(Protocol):
    """Splits what the caller gave into the shards that run here, runs them, and joins the results."""

    deal: Deal

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that run here."""
        ...

    def split(self, side: Side, arrays: Sequence[Array | None]) -> list[tuple[Array | None, ...]]:
        """For each shard that runs here, those of arrays [B, H, S, ...] with the rows of q, or of k."""
        ...

    def join(self, side: Side, parts: Sequence[Blocks]) -> Blocks:
        """What the caller gets, from what each shard that ran here has of its rows."""
        ...

    def heads(self, count: int) -> slice:
        """Which of so many heads are computed here."""
        ...

    def anywhere(self, given: bool) -> bool:
        """Whether something is given to any of the ranks that trade arrays like this one's with it."""
        ...

    def run(self, works: Sequence[Work]) -> list[Blocks | None]:
        """Run the ring loop of every shard here; what came home."""
        ...

    def sum_over_ranks(self, arrays: Blocks) -> Blocks:
        """The sums of all ranks' arrays, of which these are those of the ranks that run here; equal on every rank."""
        ...

    def check(self, check: Callable[[], None], name: str) -> None:
        """Run a check of later arguments; its error reaches every rank."""
        ...

    def guarded(self) -> AbstractContextManager[None]:
        """Around what the ranks have agreed to do: if it fails here, the others hear of it."""
        ...


class LocalSession:
    """The whole ring in this process."""

    def __init__(self, arguments: Arguments, size: int) -> None:
        q_length, k_length = arguments.q.shape[2], arguments.k.shape[2]
        visibility = visibility_of(arguments, q_length, k_length)
        if AUTO in (arguments.q_layout, arguments.k_layout):
            q_layout, k_layout = lightest(visibility, q_length, k_length, size)
        else:
            q_layout = resolve_layout(arguments.q_layout, q_length, size, "q")
            k_layout = resolve_layout(arguments.k_layout, k_length, size, "k")
        schedule = resolve_schedule(arguments.schedule, size, None)
        self.deal = Deal.of(q_layout, k_layout, visibility, schedule)
        self.ranks = range(size)
        self._whole = q_layout.whole and k_layout.whole

    def split(self, side: Side, arrays: Sequence[Array | None]) -> list[tuple[Array | None, ...]]:
        """Every rank's shards of whole arrays."""
        if self._whole:
            return [tuple(arrays)]
        layout = self.deal.layout(side)
        return [
            tuple(None if x is None else shard(x, layout, rank, layout.size) for x in arrays)
            for rank in range(layout.size)
        ]

    def join(self, side: Side, parts: Sequence[Blocks]) -> Blocks:
        """The whole arrays."""
        if self._whole:
            return parts[0]
        return tuple(unshard(shards, self.deal.layout(side)) for shards in zip(*parts, strict=True))

    def heads(self, count: int) -> slice:
        """All."""
        return slice(0, count, 1)

    def anywhere(self, given: bool) -> bool:
        """As here: nothing is traded."""
        return given

    def run(self, works: Sequence[Work]) -> list[Blocks | None]:
        """Run all ranks' loops in turn."""
        return run_local([ring(plan, work) for plan, work in zip(self.deal.plans, works, strict=True)])

    def sum_over_ranks(self, arrays: Blocks) -> Blocks:
        """The arrays: all ranks run here."""
        return arrays

    def check(self, check: Callable[[], None], name: str) -> None:
        """Run the check."""
        check()

    def guarded(self) -> AbstractContextManager[None]:
        """There is nobody to tell."""
        return nullcontext()


class Agreeing:
    """What sessions of several processes have in common: what goes wrong on one of them, all hear of."""

    def __init__(self, members: Members, agreed: Agreed) -> None:
        self.members, self.call = members, agreed.call

    def check(self, check: Callable[[], None], name: str) -> None:
        """Run the check on every rank and agree that it passed."""

        def checked() -> tuple[None, Note]:
            check()
            return None, Note(json.dumps({"call": name, f"the call that this {name} belongs to": self.call}).encode())

        agree(self.members, checked)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Tell every rank of a failure, such as too little memory, for which they would wait."""
        try:
            yield
        except BaseException as error:
            self.members.abort(error)
            raise


class ProcessSession(Agreeing):
    """This rank of a ring of processes."""

    def __init__(self, transport: Transport, arguments: Arguments, agreed: Agreed) -> None:
        super().__init__(transport, agreed)
        self.transport, self.ranks = transport, (transport.rank,)
        visibility = visibility_of(arguments, sum(agreed.q_lengths), sum(agreed.k_lengths))
        layouts = arguments.q_layout, arguments.k_layout
        schedule = resolve_schedule(arguments.schedule, transport.size, agreed.nodes)
        self.deal = dealt(*layouts, agreed.q_lengths, agreed.k_lengths, visibility, schedule)

    def split(self, side: Side, arrays: Sequence[Array | None]) -> list[tuple[Array | None, ...]]:
        """This rank's shards, which the arrays already are."""
        return [tuple(arrays)]

    def join(self, side: Side, parts: Sequence[Blocks]) -> Blocks:
        """This rank's shards."""
        return parts[0]

    def heads(self, count: int) -> slice:
        """All."""
        return slice(0, count, 1)

    def anywhere(self, given: bool) -> bool:
        """As here: nothing is traded."""
        return given

    def run(self, works: Sequence[Work]) -> list[Blocks | None]:
        """Run this rank's loop."""
        (work,) = works
        return [run_plans(self.transport, self.deal.plans, work)]

    def sum_over_ranks(self, arrays: Blocks) -> Blocks:
        """Every rank's arrays visit all others, which add them in the order of ranks."""
        return tuple(map(add_all, zip(*gathered(self.transport, arrays), strict=True)))


def gathered(transport: Transport, arrays: Blocks) -> list[Blocks]:
    """Every rank's arrays, which are alike, in the order of ranks."""
    if transport.size == 1:
        return [arrays]
    work = GatherWork(arrays, transport.rank, transport.size)
    run_plans(transport, gather_plans(transport.size), work)
    return work.by_rank()


def run_plans(transport: Transport, plans: tuple[Plan, ...], work: Work) -> Blocks | None:
    """Run this rank's loop; blocks of ranks that share memory are read in place."""
    plan = plans[transport.rank]
    loop = ring(plan, work)
    if transport.size > 1 and _is_one_sided(type(transport)):
        reader = cast(OneSided, transport)
        if _published(reader, plans, work):
            result = run_rank(loop, InPlace(reader, plan))
            reader.retire()
            return result
    return run_rank(loop, transport)


def _published(transport: OneSided, plans: tuple[Plan, ...], work: Work) -> bool:
    specs = {rank: work.visiting_specs(Move(rank, rank)) for rank in range(transport.size)}
    carried = {plan.rank: {move: work.carried_specs(move) for move in plan.home} for plan in plans}
    carries = any(each for moves in carried.values() for each in moves.values())
    return transport.publish(work.visiting(), specs, carried if carries else None)


@lru_cache(maxsize=16)
def _is_one_sided(kind: type) -> bool:
    """Whether transports of this type are `OneSided`: asked at every call, and a protocol answers slowly."""
    return all(hasattr(kind, name) for name in ("reaches", "publish", "fetch", "retire"))


def visibility_of(arguments: Arguments, queries: int, keys: int) -> Visibility:
    """What plans must know of the arguments; ``queries`` and ``keys`` are how many all ranks have together."""
    check_columns(arguments, queries, keys)
    batch = len(arguments.offsets)
    return Visibility(
        causal=arguments.causal,
        window=arguments.window,
        offsets=arguments.offsets,
        key_limits=arguments.key_lengths or (keys,) * batch,
        heads=arguments.q.shape[1],
        key_heads=arguments.k.shape[1],
        # A joined tile may hold several ranges of columns, which no slice of a bias or mask names.
        joined=not arguments.score.dropout
        and all(x is None for x in (arguments.bias, arguments.mask, arguments.mask_of, arguments.alibi)),
        documents=None if arguments.documents is None else arguments.documents.of_entries(batch),
        dilation=arguments.dilation,
    )


@lru_cache(maxsize=64)
def dealt(
    q_layout: str | Layout, k_layout: str | Layout, q_lengths: tuple[int, ...], k_lengths: tuple[int, ...],
    visibility: Visibility, schedule: Schedule = RING, group: int = 1,
) -> Deal:  # fmt: skip
    """How shards of these lengths are dealt by the layouts, to groups of so many ranks.

    Raises LayoutError if the lengths are not the layouts'.
    """
    q_layout, k_layout = layout_of_lengths(q_layout, q_lengths, "q"), layout_of_lengths(k_layout, k_lengths, "k")
    if group > 1:
        q_layout, k_layout = (of_groups(layout, group) for layout in (q_layout, k_layout))
    return Deal.of(q_layout, k_layout, visibility, schedule)


@lru_cache(maxsize=256)
def _prefix_tiles(rows: tuple[range, ...], length: int, visibility: Visibility) -> tuple[Tile, ...]:
    limits = (0,) * len(visibility.offsets)
    seen = replace(visibility, causal=False, window=(None, None), documents=None, key_limits=limits)
    return tiles_between(rows, (range(-length, 0),), seen)


def split_term(session: Session, term: Array | None, parts: int) -> list[Array | None]:
    """The rows of a bias or mask for each shard here; one row is every shard's."""
    if term is None or term.shape[2] == 1:
        return [term] * parts
    return [part for (part,) in session.split("q", [term])]
