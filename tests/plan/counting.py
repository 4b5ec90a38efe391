"""Work for the real ring loop that counts pairs instead of computing scores, and the strictest driver for it.

What it counts it learns from the rows that really travelled, never from what a tile says about positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pairs import Pair, Problem, shown

from ringcore.local import run_local
from ringcore.ring import Loop, ring
from ringcore.values import Begin, Blocks, Finish, Move, Plan, Spec, Tile


@dataclass
class Rows:
    """One entry for each row: what stands here for an array [B, H, rows, width]."""

    entries: list[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 1, len(self.entries), 1

    def __getitem__(self, index: tuple[Any, ...]) -> Rows:
        return Rows(self.entries[index[2]])


class CountingWork:
    """A `ringcore.ring.Work` whose blocks are lists of row numbers and whose accumulators are counts of pairs.

    carries: whether the visiting rows have accumulators too, which go home. reuses: whether arriving ones are
    added to in place, which the protocol allows where nobody else has them.
    """

    def __init__(self, problem: Problem, plan: Plan, *, carries: bool, reuses: bool = True) -> None:
        self.problem, self.rank, self.carries, self.reuses = problem, plan.rank, carries, reuses
        self.resident = list(problem.resident(plan.rank))
        self.stayed: Counter[Pair] = Counter()

    def visiting(self) -> Blocks:
        return (Rows(list(self.problem.visiting(self.rank))),)

    def visiting_specs(self, move: Move) -> tuple[Spec, ...]:
        block = self.problem.visiting(move.block)
        height = len(block if move.rows is None else move.rows)
        return (Spec((1, 1, height, 1), None, None),)

    def carried_specs(self, move: Move) -> tuple[Spec, ...]:
        return self.visiting_specs(move) if self.carries else ()

    def visit(self, block: Blocks, tiles: Sequence[Tile]) -> Blocks:
        came = block[0].entries
        share: list[Counter[Pair]] = [Counter() for _ in came]
        for tile in tiles:
            rows, keys = (self.resident, came) if self.problem.visitor == "k" else (came, self.resident)
            for i, j in shown(tile):
                i, j = range(len(rows))[tile.rows][i], range(len(keys))[tile.columns][j]
                for entry in range(self.problem.batch)[tile.batch]:
                    for head in range(self.problem.heads)[tile.q_heads]:
                        pair = entry, head, rows[i], keys[j]
                        self.stayed[pair] += 1
                        share[j if self.problem.visitor == "k" else i][pair] += 1
        return (Rows(share),) if self.carries else ()

    def complete(self) -> None:
        """Nothing: counts are whole at any time."""

    def combine(self, arrived: Blocks, share: Blocks, rows: range | None = None) -> Blocks:
        (theirs,), (ours,) = arrived, share
        if rows is not None:
            for row, gained in zip(rows, theirs.entries, strict=True):
                ours.entries[row].update(gained)
            return share
        if not self.reuses:
            return (Rows([a + b for a, b in zip(theirs.entries, ours.entries, strict=True)]),)
        for gained, mine in zip(theirs.entries, ours.entries, strict=True):
            gained.update(mine)
        return arrived


def run_rendezvous(loops: Sequence[Loop]) -> list[Blocks | None]:
    """Run loops whose sends complete only once their receiver has asked for them, as unbuffered messages do.

    Blocks that arrive must look as announced, and nothing may be left over.
    """
    letters: dict[tuple[Any, ...], Blocks] = {}
    asked: dict[tuple[Any, ...], tuple[Spec, ...]] = {}
    results: list[Blocks | None] = [None] * len(loops)
    waiting: dict[int, Begin | None] = dict.fromkeys(range(len(loops)))

    def settled(rank: int, begun: Begin) -> bool:
        sends, receives = names(rank, begun)
        return all(name in asked for name in sends) and all(name in letters for name in receives)

    def names(rank: int, begun: Begin) -> tuple[list[Any], list[Any]]:
        kind = begun.kind
        sends = [(kind, rank, move.peer, move.block, move.rows) for move, _ in begun.sends]
        return sends, [(kind, move.peer, rank, move.block, move.rows) for move, _ in begun.receives]

    while waiting:
        free = [rank for rank, begun in waiting.items() if begun is None or settled(rank, begun)]
        assert free, f"ranks {sorted(waiting)} wait for each other"
        for rank in free:
            begun, reply = waiting[rank], None
            if begun is not None:
                reply = {}
                for (move, specs), name in zip(begun.receives, names(rank, begun)[1], strict=True):
                    reply[move] = letters[name]
                    assert [tuple(x.shape) for x in reply[move]] == [tuple(spec.shape) for spec in specs]
            try:
                while not isinstance(request := loops[rank].send(reply), Finish):
                    sends, receives = names(rank, request)
                    # Two messages that look alike would be taken for each other.
                    assert letters.keys().isdisjoint(sends)
                    assert asked.keys().isdisjoint(receives)
                    letters.update(zip(sends, (blocks for _, blocks in request.sends), strict=True))
                    asked.update(zip(receives, (specs for _, specs in request.receives), strict=True))
                    reply = request
                waiting[rank] = request.token
            except StopIteration as stop:
                results[rank] = stop.value
                del waiting[rank]
    assert set(letters) == set(asked)
    return results


def at_home(work: CountingWork, blocks: Blocks | None) -> Counter[Pair]:
    """Every pair that one rank's finished accumulators counted, each in the row that it belongs to."""
    assert blocks is not None
    place = 3 if work.problem.visitor == "k" else 2
    counts = blocks[0].entries
    for row, pairs in zip(work.problem.visiting(work.rank), counts, strict=True):
        assert {pair[place] for pair in pairs} <= {row}
    return sum(counts, Counter())


def check_loops(problem: Problem, plans: Sequence[Plan]) -> None:
    """Run plans through the real loop, without accumulators that go home and with them, under both drivers.

    What stays at a rank must hold the pairs of its resident rows, what comes home those of its visiting ones.
    """
    due = problem.defined()
    place = 2 if problem.visitor == "k" else 3
    for carries in (False, True):
        for results in loops_of(problem, plans, carries=carries):
            for rank, (work, blocks) in enumerate(results):
                assert work.stayed == held_by(due, place, problem.resident(rank))
                if carries:
                    assert at_home(work, blocks) == held_by(due, 5 - place, problem.visiting(rank))


def loops_of(
    problem: Problem, plans: Sequence[Plan], **how: bool
) -> Iterator[list[tuple[CountingWork, Blocks | None]]]:
    """Every rank's work and result, once for each driver."""
    for driver in (run_local, run_rendezvous):
        works = [CountingWork(problem, plan, **how) for plan in plans]
        results = driver([ring(plan, work) for plan, work in zip(plans, works, strict=True)])
        yield list(zip(works, results, strict=True))


def held_by(due: Counter[Pair], place: int, members: Sequence[int]) -> Counter[Pair]:
    """Those pairs whose row (place 2) or key (3) is among ``members``."""
    chosen = set(members)
    return Counter({pair: times for pair, times in due.items() if pair[place] in chosen})
