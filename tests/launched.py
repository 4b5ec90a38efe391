"""Whether mpiexec or torchrun started this process, and as which rank."""

import os

UNDER_MPIEXEC = any(name in os.environ for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"))
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
LAUNCHED = UNDER_MPIEXEC or UNDER_TORCHRUN


def world():
    """(rank, size) of this process."""
    if UNDER_TORCHRUN:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not UNDER_MPIEXEC:
        return 0, 1
    from mpi4py import MPI

    return MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
