"""Rings of CuPy's arrays over MPI: ``mpiexec -n 4 python -m pytest tests/cupy_adapter/ring/world``."""

import gc
import os

os.environ.setdefault("CUPY_STAND_IN_DEVICES", "4")

import cupy
import pytest
from mpi4py import MPI

from ringcore_mpi import MpiTransport

WORLD = MPI.COMM_WORLD


@pytest.fixture(autouse=True)
def own_gpu():
    """A GPU for each rank, whatever the test before it took."""
    cupy.cuda.Device(WORLD.rank % cupy.cuda.runtime.getDeviceCount()).use()


@pytest.fixture
def host():
    """A ring of all ranks, for one test."""
    transport = MpiTransport(WORLD, device_buffers=hasattr(cupy.cuda.runtime, "opened"))  # the stand-in's memory
    yield transport
    transport.close()


@pytest.fixture
def nothing_left(request):
    """That what the test opened is closed, and what it made is freed, when its rings have gone."""
    yield
    request.node.funcargs.clear()  # which would keep the host's ring
    gc.collect()
    runtime = cupy.cuda.runtime
    assert (runtime.opened, runtime.opened_events) == ({}, {})
    assert not runtime._maps, "memory of cudaMalloc was not freed"
