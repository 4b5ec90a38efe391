"""Blocks that the ranks of a node read where they lie, in shared windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpi4py import MPI

from ringcore import Blocks, Spec
from ringcore_mpi import window as windows
from ringcore_mpi.buffers import address_of, array_at, bytes_of, check_array, contiguous, size_of
from ringcore_mpi.circle import Circle
from ringcore_mpi.places import Places
from ringcore_mpi.window import Window

_ALIGNMENT = 64  # bytes of a cache line


@dataclass(frozen=True)
class Region:
    """One window of one node, as every rank of the ring knows it.

    sizes: the bytes of each rank of the node. use: "scratch" is what blocks are copied into, "lent" belongs to
    whoever called `allocate`, "stale" is an outgrown scratch that still has readers.
    """

    number: int
    node: int
    sizes: Mapping[int, int]
    use: str


class Sharing:
    """What is published, where it lies, and which windows there are.

    Every decision follows from what all ranks know, so that all take the same one: the blocks' specs, and notes
    that are gathered only when windows are made or lent ones exist.
    """

    def __init__(self, places: Places, whole: Circle, circle: Circle) -> None:
        self._places, self._whole, self._circle = places, whole, circle
        self._regions: list[Region] = []
        self._windows: dict[int, Window] = {}
        self._count = 0
        self._reachable = places.sharing
        self._specs: Mapping[int, Sequence[Spec]] = {}
        self._window: Window | None = None
        self._refused = ""

    def reaches(self, reader: int, owner: int) -> bool:
        """Whether ``reader`` can fetch what ``owner`` publishes."""
        nodes = self._places.nodes
        return reader != owner and nodes[reader] == nodes[owner] and nodes[owner] in self._reachable

    def publish(self, blocks: Blocks, specs: Mapping[int, Sequence[Spec]]) -> bool:
        """Make this rank's blocks readable; False if no node of the ring can share anything."""
        for x in (*blocks, *(spec.like for each in specs.values() for spec in each)):
            check_array(x)
        sizes = _extents(specs)
        chosen = self._lent_in_place(blocks, specs, sizes)
        in_place = self._places.node in chosen
        for region in self._regions:
            fits = all(region.sizes[rank] >= sizes[rank] for rank in region.sizes)
            if region.use == "scratch" and fits:
                chosen.setdefault(region.node, region)
        lacking = self._places.sharing - set(chosen)
        if lacking:
            chosen |= self._make(lacking, sizes, "scratch")
        self._reachable, self._specs = frozenset(chosen), specs
        mine = chosen.get(self._places.node)
        self._window = None if mine is None else self._windows[mine.number]
        if self._window is not None:
            if not in_place:
                _copy(blocks, self._window, specs[self._places.rank])
            self._fence(self._window, "publish")
        return bool(chosen)

    def fetch(self, owner: int, rows: slice | None) -> Blocks:
        """The blocks that ``owner`` published, in place."""
        if self._window is None or not self.reaches(self._places.rank, owner):
            raise LookupError(f"rank {owner} publishes nothing that rank {self._places.rank} can read; ask `reaches`.")
        blocks = _arrays(self._window, self._places.member(owner), self._specs[owner], writable=False)
        return blocks if rows is None else tuple(x[:, :, rows] for x in blocks)

    def retire(self) -> None:
        """No rank reads published blocks after this."""
        if self._window is not None:
            self._fence(self._window, "retire")
        self._window, self._specs, self._reachable = None, {}, self._places.sharing

    def allocate(self, specs: Mapping[int, Sequence[Spec]]) -> Blocks | None:
        """This rank's own writable arrays in a window, or None if its node has none to give."""
        for each in specs.values():
            for spec in each:
                check_array(spec.like)
        made = self._make(self._places.sharing, _extents(specs), "lent")
        mine = made.get(self._places.node)
        if mine is None:
            return None
        rank = self._places.rank
        return _arrays(self._windows[mine.number], self._places.member(rank), specs[rank], writable=True)

    def explain(self) -> str:
        """How blocks reach this rank, and why."""
        if self._refused:
            return self._refused
        node = self._places.node
        if node not in self._places.sharing:
            return f"messages: {self._places.why_alone}"
        others = ", ".join(str(rank) for rank in self._places.members if rank != self._places.rank)
        held = sum(window.size for window in self._windows.values())
        beyond = "; messages to other nodes" if len(self._places.members) < len(self._places.nodes) else ""
        return f"window: ranks {others} of node {node} are read in place ({held} bytes of this rank are shared){beyond}"

    def close(self) -> None:
        """Free every window that no array lies in any more. Collective over the ring."""
        self._window = None
        self._sweep(self._places.sharing, "close")

    @property
    def windows(self) -> int:
        """How many windows this rank has a part in."""
        return len(self._windows)

    def _lent_in_place(
        self, blocks: Blocks, specs: Mapping[int, Sequence[Spec]], sizes: Mapping[int, int]
    ) -> dict[int, Region]:
        """The lent regions of nodes whose ranks all publish exactly what lies there."""
        lent = [
            region
            for region in self._regions
            if region.use == "lent"
            and all(region.sizes[rank] == max(sizes[rank], windows.PAGE) for rank in region.sizes)
        ]
        if not lent:
            return {}
        rank = self._places.rank
        mine = [
            region.number
            for region in lent
            if region.node == self._places.node and _lies_in(blocks, self._windows[region.number], specs[rank])
        ]
        votes = self._whole.gather("publish in place", str(mine[0] if mine else "").encode())
        return {
            region.node: region
            for region in lent
            if all(votes[rank] == str(region.number).encode() for rank in region.sizes)
        }

    def _make(self, nodes: frozenset[int], sizes: Mapping[int, int], use: str) -> dict[int, Region]:
        """New windows for these nodes, as far as there is room; by node. Collective over the ring."""
        grown = {region.node for region in self._regions if region.use == "scratch"} if use == "scratch" else set()
        self._sweep(nodes if use == "scratch" else frozenset(), "look for unused windows")
        places = self._places
        due = {rank: max(sizes[rank], windows.PAGE) for rank in sizes if places.nodes[rank] in nodes}
        # One that had to grow will have to grow again: with some room to spare, that is seldom.
        due = {rank: size + size // 4 if places.nodes[rank] in grown else size for rank, size in due.items()}
        need, room = sum(due.get(rank, 0) for rank in places.neighbours), windows.free_room()
        willing = self._agreed(nodes, "ask for shared memory", need <= room)
        window = None
        if places.node in willing:
            window = self._allocated(due[places.rank])
        holding = self._agreed(willing, "make windows", window is not None and window.populate())
        self._refused = ""
        if places.node in nodes - holding:
            self._refused = f"messages: no room in shared memory ({need} bytes needed on this machine, {room} free)"
            if window is not None:
                window.free()
        made = {}
        for node in sorted(holding):
            self._count += 1
            members = [rank for rank in due if places.nodes[rank] == node]
            made[node] = Region(self._count, node, {rank: due[rank] for rank in members}, use)
            if node == places.node and window is not None:
                self._windows[self._count] = window
        self._regions += made.values()
        return made

    def _allocated(self, size: int) -> Window | None:
        try:
            return Window(self._places.comm, size)
        except MPI.Exception:
            return None

    def _sweep(self, outgrown: frozenset[int], operation: str) -> None:
        """Free the windows without any array in them, but for the scratch of nodes that do not grow."""
        in_use = [str(number) for number, window in self._windows.items() if window.in_use()]
        notes = self._whole.gather(operation, " ".join(in_use).encode())
        told = [set(note.decode().split()) for note in notes]
        kept = []
        for region in self._regions:
            if region.use == "scratch" and region.node not in outgrown:
                kept.append(region)
            elif any(str(region.number) in told[rank] for rank in region.sizes):
                use = "stale" if region.use == "scratch" else region.use
                kept.append(Region(region.number, region.node, region.sizes, use))
            elif region.number in self._windows:
                self._windows.pop(region.number).free()
        self._regions = kept

    def _agreed(self, nodes: frozenset[int], operation: str, fine: bool) -> frozenset[int]:
        """Those of the nodes on whose every rank all is fine."""
        notes = self._whole.gather(operation, b"1" if fine else b"0")
        bad = {self._places.nodes[rank] for rank, note in enumerate(notes) if note == b"0"}
        return nodes - bad

    def _fence(self, window: Window, operation: str) -> None:
        window.sync()
        self._circle.gather(operation)
        window.sync()


def _offsets(specs: Sequence[Spec]) -> list[int]:
    """Where each block begins, and where the last one ends."""
    offsets = [0]
    for spec in specs:
        offsets.append(math.ceil((offsets[-1] + size_of(spec)) / _ALIGNMENT) * _ALIGNMENT)
    return offsets


def _extents(specs: Mapping[int, Sequence[Spec]]) -> dict[int, int]:
    return {rank: _offsets(each)[-1] for rank, each in specs.items()}


def _arrays(window: Window, member: int, specs: Sequence[Spec], *, writable: bool) -> Blocks:
    memory = window.memory(member)
    return tuple(
        array_at(memory[start : start + size_of(spec)], spec, writable=writable)
        for start, spec in zip(_offsets(specs), specs, strict=False)
    )


def _copy(blocks: Blocks, window: Window, specs: Sequence[Spec]) -> None:
    for x, start, spec in zip(blocks, _offsets(specs), specs, strict=False):
        laid = contiguous(x)  # named, as it may be a new array: bytes_of keeps nothing alive
        window.own[start : start + size_of(spec)] = bytes_of(laid)


def _lies_in(blocks: Blocks, window: Window, specs: Sequence[Spec]) -> bool:
    """Whether the blocks are exactly the arrays at the beginning of this rank's part of the window."""
    base = window.own.ctypes.data
    return len(blocks) == len(specs) and all(
        tuple(x.shape) == spec.shape
        and x.dtype == spec.dtype
        and (size_of(spec) == 0 or address_of(x) == base + start)
        and address_of(contiguous(x)) == address_of(x)
        for x, start, spec in zip(blocks, _offsets(specs), specs, strict=False)
    )
