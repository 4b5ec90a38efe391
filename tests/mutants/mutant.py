"""One wrong line of code, and the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

RING = "tests/conformance/test_attention.py"
REFERENCE = f"{RING} --backend numpy-reference"
KERNELS = "tests/test_numpy_kernels.py"
REPORT = "tests/test_original_report.py"
LAWS = "tests/test_merge_laws.py"
PRECISION = "tests/test_precision.py"
PLAN = "tests/plan"


@dataclass(frozen=True)
class Mutant:
    """A change of the source that makes a result wrong.

    name: the trap, in words; unique. file: where, from the root of the repository.
    source: the exact text to replace, which occurs there once. replacement: what takes its place.
    tests: what pytest is given; ``only``: its -k, "" for all of them. One of these tests must fail.
    ranks: how many processes the launcher starts, mpiexec or torchrun; 0 is none.
    error: what the test fails with; anything else is no kill, but a mutant or a test that does not work.
    hangs: whether ranks that wait for ever, or up to a deadline, are a kill too.
    """

    name: str
    file: str
    source: str
    replacement: str
    tests: str
    only: str = ""
    ranks: int = 0
    launcher: str = "mpiexec"
    error: str = "AssertionError"
    hangs: bool = False
