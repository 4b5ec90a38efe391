"""Rings of real GPUs: ``mpiexec -n 2 python -m pytest tests/cupy_gpu/ring``, with a GPU for each rank."""

import cupy
import pytest
from mpi4py import MPI

from ringcore_cupy import CupyTransport
from ringcore_mpi import MpiTransport

WORLD = MPI.COMM_WORLD


@pytest.fixture(autouse=True)
def own_gpu():
    """A GPU for each rank, whatever the test before it took."""
    cupy.cuda.Device(WORLD.rank % cupy.cuda.runtime.getDeviceCount()).use()


@pytest.fixture
def host():
    """A ring of all ranks, for one test."""
    transport = MpiTransport(WORLD)
    yield transport
    cupy.cuda.runtime.deviceSynchronize()
    WORLD.Barrier()
    transport.close()


@pytest.fixture(params=["ipc", "nccl", "host", "mpi"])
def ring(request, host):
    """A ring by each carrier; MPI's own only where the library says that it takes a GPU's memory."""
    if request.param == "mpi" and not host.device_buffers:
        pytest.skip("this MPI library does not say that it takes a GPU's memory")
    made = CupyTransport(host, carrier=request.param)
    yield made
    made.close()
