"""One array of each rank, reduced by MPI itself with a function of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from ringcore import Array
from ringcore_mpi.line import Line, keep

Combine = Callable[[Array, Array], Array]


def reduced(line: Line, x: Array, combine: Combine) -> Array:
    """``combine`` of all ranks' arrays, neighbours first, in the order of ranks; the same on every rank.

    x: contiguous, of one shape and dtype on all ranks. Raises RingTimeout or PeerError. MPI cannot give a reduction up:
    after an error its memory is kept for ever.
    """
    result = np.empty_like(x)
    whole = MPI.BYTE.Create_contiguous(x.nbytes).Commit()  # so that MPI does not reduce a part of it by itself

    def operation(first: Any, second: Any, _: Any) -> None:
        lower, upper = (np.frombuffer(memory, dtype=x.dtype).reshape(x.shape) for memory in (first, second))
        upper[...] = combine(lower, upper)

    operator = MPI.Op.Create(operation, commute=False)
    request = line.comm.Iallreduce([x, 1, whole], [result, 1, whole], op=operator)
    try:
        line.poll(lambda: bool(request.Test()), lambda: "all ranks to take part in a reduction")
    except BaseException:
        keep(request, x, result, operator, whole)
        raise
    operator.Free()
    whole.Free()
    return result
