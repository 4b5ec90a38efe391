"""Whether this process is one rank of many, as the launcher's environment says, and its transport."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ringcore.cli.failures import Failure
from ringcore.discovery import find_transport
from ringcore.errors import MissingDependency
from ringcore.protocols import Transport

_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")


def launched_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks the launcher started; 1 without a launcher.

    A launcher that says only which rank this is (PMIX_RANK) counts as more than one: 2 stands for "not known".
    """
    for name in _SIZES:
        if (size := environment.get(name, "")).isdecimal():
            return int(size)
    return 2 if "PMIX_RANK" in environment else 1


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Which of them this is."""
    if launched_size(environment) > 1:
        for name in _RANKS:
            if (rank := environment.get(name, "")).isdecimal():
                return int(rank)
    return 0


def join_ring() -> Transport | None:
    """This rank's transport, or None in a process that is alone.

    Raises MissingDependency without mpi4py, Failure if its MPI is not the launcher's: both would
    otherwise be independent runs that write the same file.
    """
    size = launched_size()
    if size == 1:
        return None
    try:
        from mpi4py import MPI
    except ImportError as exc:
        raise MissingDependency(
            f"a launcher started {size} ranks, but they cannot talk to each other without mpi4py, which is not "
            f'installed or finds no MPI library ({exc}): pip install "ringcore[mpich]", or run without mpiexec.'
        ) from exc
    world = MPI.COMM_WORLD
    if world.Get_size() == 1 and "PMIX_RANK" not in os.environ:
        vendor = MPI.get_vendor()[0]
        raise Failure(
            f"a launcher started {size} ranks, but each sees itself alone: mpi4py uses {vendor}, and the launcher "
            'belongs to another MPI. Start the ranks with the mpiexec that pip install "ringcore[mpich]" brings.',
            2,
        )
    return find_transport(world) if world.Get_size() > 1 else None
