"""The one ring loop.

The loop is a generator without any I/O: it yields `Begin` and `Finish` and is resumed with what arrived. What
visits, what stays and what is carried home is the work's business; the plan says when and where.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from ringcore.arrays import slice_of
from ringcore.values import Begin, Blocks, Finish, Held, Move, Plan, Spec, Tile

Loop: TypeAlias = Generator[Begin | Finish, Any, Blocks | None]


class Work(Protocol):
    """What one rank computes with the blocks that visit it."""

    def visiting(self) -> Blocks:
        """This rank's own block, which visits the others."""
        ...

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        """What a visiting block looks like on arrival."""
        ...

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        """What the accumulators of a block look like on arrival; empty if this work carries none."""
        ...

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        """Compute the tiles; the accumulators that must go home with the block."""
        ...

    def complete(self) -> None:
        """No tile follows: do what nobody else is needed for, while accumulators are on their way home."""
        ...

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        """Accumulators of disjoint work as one; ``rows`` are those of ``share`` that arrived, None is all of them.

        Buffers may be reused, except where the plan sends one rank's accumulators to several.
        """
        ...


def ring(plan: Plan, work: Work) -> Loop:
    """One rank's part in the ring; returns the accumulators of its own block, all shares added.

    Blocks move on while the tiles that read them are computed. Accumulators follow one step behind.
    """
    carries = bool(work.carried_specs(Move(plan.rank, plan.rank)))
    held: dict[Held, Blocks] = {(plan.rank, None): work.visiting()}
    own: Blocks | None = None
    leaving: list[Any] = []
    homecoming: list[tuple[Move, Any]] = []
    moving: Any = None
    coming: Any = None
    arrived: Mapping[Move, Blocks] = {}
    beside = False
    if carries:
        # Asked for before anything is sent: a last guest must never wait for its host to finish.
        for move in plan.home:
            homecoming.append((move, (yield Begin("carried", receives=((move, work.carried_specs(move)),)))))
    for place, step in enumerate(plan.steps):
        if step.sends or step.receives:
            moving = yield Begin(
                "visiting",
                sends=tuple((move, _held(held, move)) for move in step.sends),
                receives=tuple((move, work.visiting_specs(move)) for move in step.receives),
            )
        if carries and not beside:
            # Of steps that share what moves: both at once, as their peers sent them.
            expected = [each.carry_in for each in plan.steps[place : place + 1 + step.holds] if each.carry_in]
            if expected:
                coming = yield Begin("carried", receives=tuple((move, work.carried_specs(move)) for move in expected))
        if step.block is not None:
            visitor, tiles = held[step.block, step.rows], step.tiles
            if carries and step.carry_out:
                visitor, tiles = _cut(visitor, tiles, step.carry_out[0].rows, step.rows)
            share = work.visit(visitor, tiles)
            if carries and step.carry_in:
                if coming is not None:
                    arrived, coming = (yield Finish(coming)), None
                share = work.combine(arrived[step.carry_in], share)
            if carries:
                while leaving and not beside:
                    yield Finish(leaving.pop())
                if step.carry_out:
                    leaving.append((yield Begin("carried", sends=tuple((move, share) for move in step.carry_out))))
                if not step.carry_out or step.block == plan.rank:
                    own = share
        if moving is not None and not step.holds:
            held |= {(move.block, move.rows): blocks for move, blocks in (yield Finish(moving)).items()}
            moving = None
        for key in step.drops:
            del held[key]
        beside = step.holds
    work.complete()
    for move, token in homecoming:
        own = work.combine((yield Finish(token))[move], own or (), move.rows)
    while leaving:
        yield Finish(leaving.pop())
    return own


def _cut(
    block: Blocks, tiles: tuple[Tile, ...], rows: range | None, arrived: range | None
) -> tuple[Blocks, tuple[Tile, ...]]:
    """The rows of a block that accumulators are carried for, and its tiles counted in them."""
    if rows is None or rows == arrived:
        return block, tiles
    back = rows.start

    def counted(tile: Tile) -> Tile:
        columns = slice(tile.columns.start - back, tile.columns.stop - back, tile.columns.step)
        return replace(tile, columns=columns)

    return _rows(block, rows), tuple(map(counted, tiles))


def _held(held: dict[Held, Blocks], move: Move) -> Blocks:
    """What moves on: as it came, or rows of this rank's own block."""
    came = held.get((move.block, move.rows))
    return _rows(held[move.block, None], move.rows) if came is None else came


def _rows(blocks: Blocks, rows: range | None) -> Blocks:
    return blocks if rows is None else tuple(x[:, :, slice_of(rows), ...] for x in blocks)
