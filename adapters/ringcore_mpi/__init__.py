"""Rings of processes over MPI: messages between hosts, shared windows within one."""

from ringcore_mpi.attribute import adapt
from ringcore_mpi.transport import MpiTransport

__all__ = ["MpiTransport", "adapt"]
