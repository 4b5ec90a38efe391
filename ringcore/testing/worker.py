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

from ringcore.testing.asking import Fault, answer, asked
from ringcore.testing.libraries import library_of
from ringcore.testing.signatures import attention_of, load


def main(spec: dict[str, Any], folder: Path) -> None:
    """Ask, from the question that is next."""
    sys.path.insert(0, os.getcwd())  # where its own modules are, as for ``python -m``
    attention, accepts, library = attention_of(load(spec["target"]), spec["signature"])
    library = spec["library"] or library
    accepts = tuple(name for name in accepts if name in (spec["accepts"] or accepts))
    made = library_of(library, spec["dtype"])
    everything = asked(accepts, spec["ring_sizes"], made)
    _write(folder / "asked.json", {"library": library, "accepts": accepts})
    for number in range(spec["first"], len(everything)):
        question, size = everything[number]
        _write(folder / "begun.json", {"number": number, "question": question.name, "size": size})
        faults: list[Fault] = []
        given = answer(attention, question, size, made, spec["gradients"], faults)
        if given is not None:
            np.savez(folder / f"{number}.npz", **given)  # type: ignore[arg-type]
        _write(folder / f"{number}.json", [[each.words, each.unanswered] for each in faults])
    _write(folder / "done.json", True)


def _write(path: Path, value: Any) -> None:
    """All of it or nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
