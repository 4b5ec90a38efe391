"""A process that asks one implementation, so that what it does to its process ends no audit.

    python -m ringcore.testing.worker SPEC FOLDER

SPEC is JSON as `ringcore.testing.auditing.Spec`. Of each question from the ``first`` on it writes that it begins, then
the answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ringcore.layout import resolve_layout
from ringcore.testing.asking import Fault, answer, asked
from ringcore.testing.libraries import library_of
from ringcore.testing.problem import Dealt
from ringcore.testing.signatures import attention_of, load


def main(spec: dict[str, Any], folder: Path) -> None:
    """Ask, from the question that is next; under a launcher each rank is asked about its shards."""
    sys.path.insert(0, os.getcwd())  # where its own modules are, as for ``python -m``
    rank, ring = _joined(spec["launcher"], *spec["ring_sizes"])
    attention, accepts, library = attention_of(load(spec["target"]), spec["signature"], ring)
    library = spec["library"] or library
    accepts = tuple(name for name in accepts if name in (spec["accepts"] or accepts))
    made = library_of(library, spec["dtype"])
    everything = asked(accepts, spec["ring_sizes"], made, spec["length"])
    if rank == 0:
        _write(folder / "asked.json", {"library": library, "accepts": accepts})
    for number in range(spec["first"], len(everything)):
        question, size = everything[number]
        if rank == 0:
            _write(folder / "begun.json", {"number": number, "question": question.name, "size": size})
        if ring is not None:
            question = question.of_rank(Dealt.by(resolve_layout(spec["layout"], spec["length"], size)), rank)
        faults: list[Fault] = []
        given = answer(attention, question, size, made, spec["gradients"], faults)
        if given is not None:
            np.savez(folder / f"{number}.{rank}.npz", **given)  # type: ignore[arg-type]
        _write(folder / f"{number}.{rank}.json", [[each.words, each.unanswered] for each in faults])
    _write(folder / f"done.{rank}.json", True)


def _joined(launcher: str, *sizes: int) -> tuple[int, Any]:
    """This process's rank, and what joins it to the others; None if it is alone."""
    if launcher == "mpiexec":
        from mpi4py import MPI

        if MPI.COMM_WORLD.Get_size() != sizes[0]:
            raise RuntimeError(
                f"mpiexec started {sizes[0]} processes, but this one sees {MPI.COMM_WORLD.Get_size()}: it belongs to "
                "another MPI library than mpi4py's."
            )
        return MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD
    if launcher == "torchrun":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        return dist.get_rank(), dist.group.WORLD
    return 0, None


def _write(path: Path, value: Any) -> None:
    """All of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value))
    part.replace(path)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
