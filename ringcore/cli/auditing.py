"""``ringcore audit``: what comes of asking somebody's attention, as a table for people and JSON for machines."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ringcore.cli.audit_page import check_drawing, page
from ringcore.errors import FileError, KeywordError
from ringcore.layout import NAMED
from ringcore.testing.asking import ACCEPTS
from ringcore.testing.auditing import Audit, audit
from ringcore.testing.libraries import DEVICES, LIBRARIES, library_of
from ringcore.testing.report import TOLERANCES
from ringcore.testing.running import LAUNCHERS, Spec
from ringcore.testing.signatures import SIGNATURES

_LONGEST = 1e6  # seconds: about 9e9 overflow what waits for them


def run_audit(spec: Spec, path: Path | None, html: Path | None = None) -> int:
    """Ask, print, write; the exit status."""
    _check(spec)
    for written in (path, html):
        if written is not None:
            _check_written(written)
    if html is not None:
        check_drawing()
    found = audit(spec)
    _print(found)
    if path is not None:
        _write(path, _numbers_in_lines(json.dumps(_finite(found.as_json()), indent=1, allow_nan=False)) + "\n")
    if html is not None:
        _write(html, page(found))
    return 0 if found.report.right else 1


def _finite(x: Any) -> Any:
    """The same with None for what JSON has no number for: NaN and infinity."""
    if isinstance(x, dict):
        return {name: _finite(each) for name, each in x.items()}
    if isinstance(x, list):
        return [_finite(each) for each in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _numbers_in_lines(text: str) -> str:
    """Lists of nothing but numbers on one line each: weights are many."""
    return re.sub(r"\[[\s\d.,e+null-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)


def _check_written(path: Path) -> None:
    """Before hours of asking. Raises FileError if no file can be written there."""
    folder = path.parent
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "permission denied"
    else:
        return
    raise FileError(f"the report cannot be written to {path}: {why}.")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # what others say may hold half characters
    except OSError as error:
        raise FileError(f"the report cannot be written to {path}: {error}.") from error


def ring_sizes(text: str) -> tuple[int, ...]:
    """ "1,2,4" as numbers, each once; raises KeywordError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise KeywordError(f"--ranks is {text!r}; it must hold ring sizes of 1 or more, such as 1,2,4.")
    return tuple(dict.fromkeys(map(int, parts)))


def _check(spec: Spec) -> None:
    if spec.signature not in SIGNATURES and not Path(spec.signature).is_file():
        raise KeywordError(
            f"--signature is {spec.signature!r}; it must be one of {', '.join(SIGNATURES)}, or a Python file."
        )
    told = ("library", spec.library, LIBRARIES), ("dtype", spec.dtype, TOLERANCES), ("device", spec.device, DEVICES)
    for name, value, known in told:
        if value is not None and value not in known:
            raise KeywordError(f"--{name} is {value!r}; it must be one of {', '.join(known)}.")
    if spec.library is not None:
        try:
            library_of(spec.library, spec.dtype, spec.device)
        except ValueError as error:
            raise KeywordError(f"--{error}") from error
    if spec.launcher not in LAUNCHERS:
        raise KeywordError(f"--launcher is {spec.launcher!r}; it must be one of {', '.join(LAUNCHERS)}.")
    if spec.layout not in NAMED:
        raise KeywordError(f"--layout is {spec.layout!r}; it must be one of {', '.join(NAMED)}.")
    if spec.length < 12:
        raise KeywordError(f"--length is {spec.length}; ask about 12 positions or more.")
    for name in spec.accepts:
        if name not in ACCEPTS:
            raise KeywordError(f"--only holds {name!r}; it must hold some of {', '.join(ACCEPTS)}.")
    if not 0 < spec.deadline <= _LONGEST:
        raise KeywordError(
            f"--deadline is {spec.deadline:g}; it must be a number of seconds above 0, up to {_LONGEST:g}."
        )


def _print(found: Audit) -> None:
    console, report = Console(highlight=False), found.report
    sizes = found.spec.ring_sizes

    def shown(text: str) -> str:  # what others say may hold what the terminal has no bytes for
        return text.encode(console.encoding, "backslashreplace").decode(console.encoding)

    if report.errors:
        table = Table(
            title=shown(f"{found.spec.target}: largest error over the largest number due"), title_justify="left"
        )
        for column in ("question", "result", *(f"ring of {size}" for size in sizes)):
            table.add_column(column)
        for question, result in dict.fromkeys((question, result) for question, _, result in report.errors):
            errors = [report.errors.get((question, size, result)) for size in sizes]
            cells = ("no answer" if error is None else f"{error:.1e}" for error in errors)
            table.add_row(question, result, *cells)
        console.print(table)
    console.print(shown(str(report)), markup=False, soft_wrap=True)
