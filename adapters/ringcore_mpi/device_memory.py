"""Whether the MPI library takes a GPU's memory: asked, never tried."""

from __future__ import annotations

import ctypes
from functools import cache

from mpi4py import MPI


@cache
def takes_device_memory() -> bool:
    """Whether the library that mpi4py loaded says of itself that it is CUDA-aware, at run time.

    By ``int MPIX_Query_cuda_support(void)``, an extension of Open MPI (from 2.0 on, documented in its manual:
    docs.open-mpi.org, man page MPIX_Query_cuda_support(3)) that MPICH has as well (from 4.0 on, in its mpi.h). A
    library without it is taken for one that is not, whatever it is told in the environment.
    """
    if not MPI.Is_initialized() or MPI.Is_finalized():
        return False
    try:
        # By its handle what mpi4py's module was linked with is searched, too, and no other MPI library.
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support
    except (OSError, AttributeError):
        return False
    query.restype, query.argtypes = ctypes.c_int, ()
    return bool(query() == 1)
