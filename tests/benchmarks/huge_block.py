"""A block of more than 2**31 elements as messages between two ranks: what arrives is what was sent.

    mpiexec -n 2 python tests/benchmarks/huge_block.py

It takes 4.3 GB on each rank, and some 20 seconds, which is why it is no test; the tests cut small blocks likewise.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from mpi4py import MPI

from ringcore import Move, Spec
from ringcore_mpi import MpiTransport

LENGTH = 2**31 + 12345
PART = 2**20


def expected(start: int) -> np.ndarray:
    """The part that begins at ``start``: its number, then counting up."""
    part = np.arange(min(PART, LENGTH - start), dtype="uint16")
    part[0] = start // PART
    return part


def main() -> None:
    world = MPI.COMM_WORLD
    if world.size != 2:
        sys.exit("this needs two ranks: mpiexec -n 2")
    ring = MpiTransport(world, shared=False, timeout=300)
    like = np.empty(0, dtype="float16")
    start = time.perf_counter()
    if world.rank == 0:
        x = np.empty(LENGTH, dtype="float16")
        for first in range(0, LENGTH, PART):
            x.view("uint16")[first : first + PART] = expected(first)
        ring.exchange("visiting", [(Move(1, 0), (x.reshape(1, 1, LENGTH, 1),))], []).wait()
        print(f"sent {ring.bytes_sent} bytes in {ring.messages_sent} messages")
        return
    move = Move(0, 0)
    pending = ring.exchange("visiting", [], [(move, (Spec((1, 1, LENGTH, 1), like, like.dtype),))])
    numbers = pending.wait()[move][0].reshape(-1).view("uint16")
    for first in range(0, LENGTH, PART):
        if not np.array_equal(numbers[first : first + PART], expected(first)):
            sys.exit(f"the part at element {first} differs")
    print(f"received {len(numbers)} elements rightly in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
