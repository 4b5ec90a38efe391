"""The groups of ranks that tests ask for: ``mpiexec -n 4 python -m pytest tests/mpi/world``."""

import pytest
from mpi4py import MPI

WORLD = MPI.COMM_WORLD


@pytest.fixture
def group():
    """A function that gives the communicator of so many ranks, or None on the others."""
    made = []

    def split(size, order=1):
        if size > WORLD.size:
            pytest.skip(f"needs {size} ranks")
        comm = WORLD.Split(0 if WORLD.rank < size else MPI.UNDEFINED, order * WORLD.rank)
        made.append(comm)
        return None if comm == MPI.COMM_NULL else comm

    yield split
    for comm in made:
        if comm != MPI.COMM_NULL:
            comm.Free()
