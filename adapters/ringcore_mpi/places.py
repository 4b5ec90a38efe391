"""Which ranks sit where: machines, nodes, neighbours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from ringcore import AgreementError, TransportError
from ringcore_mpi.circle import Circle
from ringcore_mpi.window import unname_segments


@dataclass(frozen=True)
class Places:
    """Where every rank of a ring sits; equal on all ranks but for ``rank`` and ``comm``.

    nodes: the node number of each rank. domains: for each rank the first rank with which it can share memory.
    sharing: the nodes that share memory. comm: a communicator of this rank's node, or None.
    """

    rank: int
    nodes: tuple[int, ...]
    domains: tuple[int, ...]
    sharing: frozenset[int]
    why_alone: str
    comm: Any

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.nodes[self.rank]

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks of this rank's node."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.node)

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks on this rank's machine."""
        return tuple(rank for rank, domain in enumerate(self.domains) if domain == self.domains[self.rank])

    def member(self, rank: int) -> int:
        """The place of a rank of this node in ``comm``."""
        return self.members.index(rank)


def find_places(comm: Any, whole: Circle, node: int | None, shared: bool) -> Places:
    """Ask MPI which ranks share memory, and agree on the nodes. Collective.

    Raises AgreementError if only some ranks name their node, TransportError if a node spans several machines.
    """
    whole.gather("begin")  # all ranks are here: what follows blocks only until each of them has made the same call
    machine = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.Get_rank())
    mine, ours = machine.Get_group(), comm.Get_group()
    first = int(MPI.Group.Translate_ranks(mine, [0], ours)[0])
    notes = [json.loads(note) for note in whole.gather("places", json.dumps([first, node, shared]).encode())]
    unname_segments()
    domains = tuple(int(note[0]) for note in notes)
    nodes = _nodes(domains, [note[1] for note in notes])
    permitted = all(note[2] for note in notes)
    rank = comm.Get_rank()
    split = machine.Split(nodes[rank], rank)
    mine.Free(), ours.Free(), machine.Free()
    sharing = frozenset(name for name in nodes if nodes.count(name) > 1) if permitted else frozenset()
    why_alone = "this rank is alone on its node" if permitted else "shared=False was given"
    return Places(rank, nodes, domains, sharing, why_alone, split)


def _nodes(domains: Sequence[int], named: Sequence[int | None]) -> tuple[int, ...]:
    if all(name is None for name in named):
        order = sorted(set(domains))
        return tuple(order.index(domain) for domain in domains)
    nodes = []
    for rank, name in enumerate(named):
        if name is None:
            raise AgreementError(f"node came on some ranks, but not on rank {rank}. Give it on every rank or on none.")
        nodes.append(name)
    for rank, name in enumerate(nodes):
        other = nodes.index(name)
        if domains[other] != domains[rank]:
            raise TransportError(
                f"node is {name} on ranks {other} and {rank}, which share no memory: they are on different machines. "
                "Give ranks of different machines different nodes."
            )
    return tuple(nodes)
