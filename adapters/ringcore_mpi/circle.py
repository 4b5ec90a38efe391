"""Small collective exchanges among some ranks, from messages that can be given up."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from ringcore import AgreementError
from ringcore_mpi.line import CONTROL_TAG, Line

_HEADER = struct.Struct("<Q24s")
_LENGTH = struct.Struct("<Q")


class Circle:
    """Ranks that tell each other short notes, in step.

    Not MPI's own collectives: those cannot be cancelled once a peer has failed. With n members this takes
    ceil(log2(n)) messages each (Bruck et al. 1997), which carry the number and name of the operation.
    """

    def __init__(self, line: Line, members: Sequence[int]) -> None:
        self._line = line
        self._members = tuple(members)
        self._place = self._members.index(line.rank)
        self._count = 0

    def gather(self, operation: str, note: bytes = b"") -> tuple[bytes, ...]:
        """Every member's note, in the order of members. Also a barrier.

        Raises AgreementError if a member is in another operation, RingTimeout, PeerError.
        """
        line, size = self._line, len(self._members)
        self._count += 1
        header = _HEADER.pack(self._count, operation.encode())
        notes, sends, step = [note], [], 1
        while step < size:
            count = min(step, size - step)
            body = b"".join(_LENGTH.pack(len(part)) + part for part in notes[:count])
            to = self._members[(self._place - step) % size]
            sends.append(line.comm.Isend([header + body, MPI.BYTE], to, CONTROL_TAG))
            notes += self._receive(self._members[(self._place + step) % size], operation)
            step += count
        if sends:
            line.poll(lambda: bool(MPI.Request.Testall(sends)), lambda: f"its notes to leave ({operation})")
        return tuple(notes[(place - self._place) % size] for place in range(size))

    def _receive(self, source: int, operation: str) -> list[bytes]:
        line = self._line
        status = MPI.Status()
        found: Any = None

        def arrived() -> bool:
            nonlocal found
            found = line.comm.Improbe(source=source, tag=CONTROL_TAG, status=status)
            return found is not None

        def waiting_for() -> str:
            return f"rank {source} to take part in {operation}"

        line.poll(arrived, waiting_for)
        data = bytearray(status.Get_count(MPI.BYTE))
        request = found.Irecv([data, MPI.BYTE])
        line.poll(lambda: bool(request.Test()), waiting_for)
        number, name = _HEADER.unpack_from(data)
        theirs = name.rstrip(b"\0").decode()
        if (number, theirs) != (self._count, operation):
            line.catch_up()  # a peer that failed is the better reason
            raise AgreementError(
                f"the ranks are out of step: rank {line.rank} is in its operation {self._count} ({operation}), rank "
                f"{source} in its operation {number} ({theirs}). Every rank must make the same calls in the same order."
            )
        return _unpack(data)


def _unpack(data: bytearray) -> list[bytes]:
    notes, place = [], _HEADER.size
    while place < len(data):
        (length,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        notes.append(bytes(data[place : place + length]))
        place += length
    return notes
