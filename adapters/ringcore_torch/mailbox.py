"""Notes between ranks of one machine, through memory that they share.

A thread that blocks in a message wakes slowly, and runs slowly after: between GPUs a short call would take three times
as long. Here it polls, for as long as a peer that makes the same call may take, and then sleeps between its looks.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

_HEADER = struct.Struct("<QI")  # the number of the note, and the sum of both: stores may be seen in any order
_SPIN = 2e-3  # seconds of polling without sleep
_PAUSE = 2e-4  # seconds of sleep between looks after that
_CHECK = 0.05  # seconds between questions whether the peers live

Gather = Callable[[bytes], tuple[bytes, ...]]


class Mailbox:
    """Two places for each rank, used in turn: none writes the next note but one before all have read this one."""

    def __init__(self, memory: mmap.mmap, rank: int, processes: tuple[int, ...], room: int) -> None:
        self._memory, self._rank, self._processes = memory, rank, processes
        self._room = room
        self._count = 0

    def gathered(self, mine: bytes, deadline: float, check: Callable[[int, bool], None]) -> list[bytes]:
        """Every rank's bytes, as many as there is room for. Collective.

        ``check(peer, late)`` is called now and then while ``peer`` is waited for, and must raise at the deadline
        (monotonic) and for peers that are gone.
        """
        self._count += 1
        start = self._start(self._rank)
        self._memory[start + _HEADER.size : start + _HEADER.size + self._room] = mine
        _HEADER.pack_into(self._memory, start, self._count, self._sum(mine))
        peers = range(len(self._processes))
        notes = [mine if peer == self._rank else self._wait(peer, deadline, check) for peer in peers]
        if stopped := self.stopped():  # who left its note may have stopped waiting for this one
            check(stopped[0], False)
        return notes

    def stop(self) -> None:
        """Tell every peer that this rank waits no more."""
        self._memory[self._rank - len(self._processes)] = 1

    def stopped(self) -> list[int]:
        """The ranks that wait no more."""
        flags = self._memory[-len(self._processes) :]
        return [peer for peer, flag in enumerate(flags) if flag]

    def lives(self, peer: int) -> bool:
        """Whether the peer's process is there, and has not ended."""
        return _lives(self._processes[peer])

    def _wait(self, peer: int, deadline: float, check: Callable[[int, bool], None]) -> bytes:
        found = self._read(peer)
        if found is not None:
            return found
        now = time.monotonic()
        spin, next_check = now + _SPIN, now + _CHECK
        while (found := self._read(peer)) is None:
            now = time.monotonic()
            if now < spin:
                os.sched_yield()
                continue
            if now > min(next_check, deadline):
                check(peer, now > deadline)
                next_check = now + _CHECK
            time.sleep(_PAUSE)
        return found

    def _read(self, peer: int) -> bytes | None:
        start = self._start(peer)
        number, check = _HEADER.unpack_from(self._memory, start)
        if number != self._count:
            return None
        note = self._memory[start + _HEADER.size : start + _HEADER.size + self._room]
        return note if check == self._sum(note) else None

    def _sum(self, note: bytes) -> int:
        return crc32(note, self._count & 0xFFFFFFFF)

    def _start(self, rank: int) -> int:
        return (2 * rank + self._count % 2) * _stride(self._room)


def open_mailbox(gather: Gather, rank: int, size: int, room: int) -> Mailbox | None:
    """A mailbox for notes of ``room`` bytes. Collective; ``gather`` is how the ranks meet.

    None, on every rank, unless all share memory and see each other's processes.
    """
    length = 2 * size * _stride(room) + size  # at the end a flag of each rank
    memory, path, token = None, None, secrets.token_bytes(16)
    if rank == 0:
        memory, path = _created(length, token)
    try:
        mine = {"process": os.getpid(), "space": _space(), "token": token.hex(), "path": path}
        told = [json.loads(note) for note in gather(json.dumps(mine).encode())]
        if rank > 0 and told[0]["path"]:
            memory = _opened(told[0]["path"], length, bytes.fromhex(told[0]["token"]))
        processes = tuple(note["process"] for note in told)
        together = len({note["space"] for note in told}) == 1  # else a number names another process there
        able = memory is not None and together and all(map(_lives, processes))
        everyone = all(answer == b"yes" for answer in gather(b"yes" if able else b"no"))
    finally:
        if path is not None:
            Path(path).unlink(missing_ok=True)
    return Mailbox(memory, rank, processes, room) if everyone and memory is not None else None


def _stride(room: int) -> int:
    return -(-(_HEADER.size + room) // 64) * 64


def _created(length: int, token: bytes) -> tuple[mmap.mmap | None, str | None]:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None  # memory, where the temporary folder may be a disk
    try:
        file, path = tempfile.mkstemp(prefix="ringcore-", dir=folder)
    except OSError:
        return None, None
    try:
        # Written, not truncated: too little room shows here, by a short write or an error, not as a signal later.
        if os.write(file, b"\0" * length + token) == length + len(token):
            return mmap.mmap(file, length), path
    except OSError:
        pass
    finally:
        os.close(file)
    Path(path).unlink(missing_ok=True)
    return None, None


def _opened(path: str, length: int, token: bytes) -> mmap.mmap | None:
    """The memory of that name, if it is the one that rank 0 made."""
    try:
        with open(path, "r+b") as file:
            file.seek(length)
            return mmap.mmap(file.fileno(), length) if file.read() == token else None
    except OSError:
        return None


def _space() -> str:
    """What numbers this process: two containers may number theirs alike."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"  # what has ended stays there until its parent asks for it
