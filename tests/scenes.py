"""What the programs that launch tests start have in common; each prints lines that begin with its rank."""

import os

import ringcore


def say(*words):
    """One write, so that the lines of different ranks do not mix."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def attempt(rank, call):
    """Run it, and say how it ended."""
    try:
        call()
    except (ringcore.RingcoreError, ArithmeticError) as error:
        say(f"rank {rank}: {type(error).__name__}: {error}")
    else:
        say(f"rank {rank}: fine")


class Failing:
    """Kernels that fail at a later tile, forward or backward; ``here`` is whether on this rank."""

    def __init__(self, kernels, here, direction="forward"):
        self.kernels, self.here, self.direction, self.calls = kernels, here, direction, 0
        self.capabilities = kernels.capabilities

    def forward(self, *arrays, **keywords):
        self._count("forward")
        return self.kernels.forward(*arrays, **keywords)

    def backward(self, *arrays, **keywords):
        self._count("backward")
        return self.kernels.backward(*arrays, **keywords)

    def _count(self, direction):
        self.calls += direction == self.direction
        if self.here and direction == self.direction and self.calls == 2:
            raise ZeroDivisionError("a kernel failed")
