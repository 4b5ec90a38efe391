"""Whether the launcher and the loaded MPI library belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mpi4py import MPI

from ringcore import TransportError

# Where launchers say how many processes they started, most telling first.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpiexec"),
    ("MV2_COMM_WORLD_SIZE", "MVAPICH2's mpiexec"),
    ("PMIX_SIZE", "a PMIx launcher"),
    ("PMI_SIZE", "the mpiexec of MPICH or Intel MPI"),
    ("MPI_LOCALNRANKS", "the mpiexec of MPICH or Intel MPI"),
)


def check_launcher(environment: Mapping[str, str] | None = None) -> None:
    """Refuse a process that its launcher counts among several, but that its MPI library believes to be alone.

    Raises TransportError. Such processes would each compute a ring of one, and give wrong results without a word.
    """
    if MPI.COMM_WORLD.Get_size() != 1:
        return
    name, launcher, due = started_by(os.environ if environment is None else environment)
    if due <= 1:
        return
    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0]
    raise TransportError(
        f"MPI.COMM_WORLD has 1 process, but {name}={due} says that {launcher} started {due}: mpi4py loaded another "
        f"MPI library ({' '.join(library.split())}) than the launcher's. Start with the mpiexec of that library, or "
        "install mpi4py for the launcher's."
    )


def started_by(environment: Mapping[str, str]) -> tuple[str, str, int]:
    """The variable that tells how many processes were started, whose launcher set it, and that number (1 if none)."""
    candidates = [(name, launcher) for name, launcher in _LAUNCHERS if name in environment]
    if "SLURM_STEP_ID" in environment:  # without it this is the batch script, which is alone by right
        step = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        candidates.append((step, "srun"))
    for name, launcher in candidates:
        number = environment.get(name, "")
        if number.isdecimal() and int(number) > 1:
            return name, launcher, int(number)
    return "", "", 1
