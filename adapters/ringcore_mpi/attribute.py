"""One ring for each communicator, kept as its attribute."""

from __future__ import annotations

from functools import cache
from typing import Any

from mpi4py import MPI

from ringcore_mpi.ending import ending
from ringcore_mpi.transport import MpiTransport, check_communicator


def adapt(comm: Any) -> MpiTransport:
    """The ring of this communicator, made at the first call and kept until ``comm`` is freed.

    The first call is collective. Raises TransportError if no ring can be made of ``comm``.
    """
    check_communicator(comm)
    transport = comm.Get_attr(_key())
    if transport is None:
        transport = MpiTransport(comm)
        comm.Set_attr(_key(), transport)
    if not isinstance(transport, MpiTransport):
        raise TypeError(f"the attribute of the communicator is a {type(transport).__name__}")
    return transport


@cache
def _key() -> int:
    # Without a copy function a duplicate of the communicator starts without a ring, and so gets its own.
    key: int = MPI.Comm.Create_keyval(delete_fn=_delete)
    return key


def _delete(comm: Any, key: int, transport: MpiTransport) -> None:
    if not ending():
        transport.close()
