"""Decoding over a cache on several GPUs: partials go to all, and each rank merges them in the same order."""

import cupy
import pytest
from decoding import CALLS, check
from mpi4py import MPI

from ringcore_cupy import CupyTransport

CARRIERS = ("ipc", "nccl", "host")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", CALLS)
def test_decoding(host, carrier, name):
    ring = CupyTransport(host, carrier=carrier)
    for rows in (1, 3):
        bits = check(ring, "striped", name, rows, cupy.asarray, cupy.asnumpy)
        assert len(set(MPI.COMM_WORLD.allgather(bits))) == 1
    ring.close()
