"""A process that asks one implementation, so that what it does to its process ends no audit.

    python -m ringcore.testing.worker SPEC FOLDER

SPEC is JSON as `ringcore.testing.auditing.Spec`. Of each question from the ``first`` on it writes that it begins, then
the answer.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np

import ringcore
from ringcore.errors import KeywordError
from ringcore.layout import resolve_layout
from ringcore.testing.asking import answer, asked
from ringcore.testing.libraries import library_of
from ringcore.testing.problem import Dealt
from ringcore.testing.report import Fault
from ringcore.testing.running import read
from ringcore.testing.signatures import attention_of, load, signature_of

_NEARLY = 0.8  # of the deadline: then it says where it is, before it is ended


def main(spec: dict[str, Any], folder: Path) -> None:
    """Ask, from the question that is next; under a launcher each rank is asked about its shards."""
    sys.path.insert(0, os.getcwd())  # where its own modules are, as for ``python -m``
    (folder / f"process.{os.getpid()}").touch()  # by which it is ended, whatever its launcher made of it
    rank, ring = _joined(spec)
    if rank < 0:  # of another group: there so that ranks of the ring have other numbers elsewhere
        return
    stuck = (folder / f"stuck.{rank}.txt").open("w")  # where it is once the deadline is near
    faulthandler.dump_traceback_later(_NEARLY * spec["start"], file=stuck)
    kind = signature_of(spec["signature"])  # first: a file may prepare what the target needs
    attention, accepts, library, joins = attention_of(load(spec["target"]), kind, ring)
    library = spec["library"] or library
    for name in spec["accepts"]:
        if name not in accepts:
            raise KeywordError(
                f"--only holds {name!r}, but {spec['target']} takes {', '.join(accepts) or 'no keyword'}."
            )
    accepts = tuple(name for name in accepts if name in (spec["accepts"] or accepts))
    made = library_of(library, spec["dtype"], spec["device"])
    made.settle(rank)
    everything = asked(accepts, spec["ring_sizes"], made, spec["length"], bool(spec["strangers"]))
    if rank == 0:
        _write(
            folder / "asked.json",
            {
                "library": library,
                "accepts": accepts,
                "joins": joins,
                "versions": _versions(spec["target"], library, made.gpu()),
            },
        )
    (folder / "ready").touch()
    before = None
    for number in range(spec["first"], len(everything)):
        question, size = everything[number]
        if size in spec["given_up"]:
            continue
        if rank == 0:
            if before is not None and ring is not None:
                _await_all(folder, before, size)
            _write(folder / "begun.json", {"number": number, "question": question.name, "size": size})
        else:
            _await(folder / "begun.json", number)
        if ring is not None:
            question = question.of_rank(Dealt.by(resolve_layout(spec["layout"], spec["length"], size)), rank)
        faults: list[Fault] = []
        faulthandler.dump_traceback_later(_NEARLY * spec["deadline"], file=stuck)
        given = answer(attention, question, size, made, spec["gradients"], faults)
        faulthandler.cancel_dump_traceback_later()
        if given is not None:
            np.savez(folder / f"{number}.{rank}.npz", **given)  # type: ignore[arg-type]
        _write(folder / f"{number}.{rank}.json", [[each.words, each.kind, each.unanswered] for each in faults])
        before = number
    _write(folder / f"done.{rank}.json", True)


def _joined(spec: dict[str, Any]) -> tuple[int, Any]:
    """This process's rank in its ring, and what joins it to the others; None if it is alone.

    Below 0 for a stranger: of so many the first processes are, and belong to no ring.
    """
    strangers, (size, *_) = spec["strangers"], spec["ring_sizes"]
    if spec["launcher"] == "mpiexec":
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        if world.Get_size() != strangers + size:
            raise RuntimeError(
                f"mpiexec started {strangers + size} processes, but this one sees {world.Get_size()}: it belongs to "
                "another MPI library than mpi4py's."
            )
        rank = world.Get_rank() - strangers
        return rank, world.Split(rank < 0, rank) if strangers else world
    if spec["launcher"] == "torchrun":
        import torch.distributed as dist

        dist.init_process_group("cpu:gloo,cuda:nccl" if spec["device"] == "cuda" else "gloo")
        rank = dist.get_rank() - strangers
        return rank, dist.new_group(range(strangers, strangers + size)) if strangers else dist.group.WORLD
    return 0, None


def _versions(target: str, library: str, gpu: str | None) -> dict[str, str]:
    """Of Python, ringcore, the library, and the distribution that the function came from, as far as there are any.

    And the name of the GPU, if arrays are on one.
    """
    packages = {library, target.partition(".")[0].partition(":")[0]}
    owners = packages_distributions()
    names = sorted({name for package in packages for name in owners.get(package, ())})
    known = {"python": platform.python_version(), "ringcore": ringcore.__version__}
    return {**known, **{name: version(name) for name in names}, **({} if gpu is None else {"gpu": gpu})}


def _await(begun: Path, number: int) -> None:
    """Until the first rank has said that this question begins: what a rank does in it is not put down to another."""
    while (read(begun) or {"number": -1})["number"] < number:
        time.sleep(0.002)


def _await_all(folder: Path, number: int, ranks: int) -> None:
    """Until every rank has answered this question: the next is not blamed for one that never does."""
    while not all((folder / f"{number}.{rank}.json").exists() for rank in range(ranks)):
        time.sleep(0.002)


def _write(path: Path, value: Any) -> None:
    """All of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value))
    part.replace(path)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
