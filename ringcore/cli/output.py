"""The output files: made under a temporary name, filled by every rank, and named when all is well."""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ringcore.cli.failures import Failure
from ringcore.cli.tensors import NAMES, Stored, write_rows
from ringcore.errors import FileError
from ringcore.values import Array


@dataclass(frozen=True)
class Target:
    """One file to write: its final name, its header, and the tensors behind it."""

    final: Path
    header: bytes
    tensors: tuple[Stored, ...]

    @property
    def size(self) -> int:
        """How many bytes the file has."""
        return max(stored.offset + stored.nbytes for stored in self.tensors)


def plan_targets(
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]], out: Path, lse_out: Path | None
) -> list[Target]:
    """The files for tensors "out" and perhaps "lse": one .safetensors for both, or one .npy for each."""
    if out.suffix == ".safetensors":
        return [_safetensors_target(out, shapes)]
    finals = {"out": out, "lse": lse_out or out.with_suffix(".lse.npy")}
    return [_npy_target(finals[name], name, *shapes[name]) for name in shapes]


def check_targets(targets: Sequence[Target], inputs: Sequence[Path], force: bool) -> None:
    """Raise FileError unless the files may be written."""
    finals = [target.final for target in targets]
    if len(set(finals)) < len(finals):
        raise FileError(f"out and lse would both be written to {finals[0]}. Give --lse-out another name.")
    for final in finals:
        if final.is_dir() or not final.parent.is_dir():
            what = "is a folder" if final.is_dir() else f"cannot be written: {final.parent} is no folder"
            raise FileError(f"{final} {what}. Give the name of a file in a folder that exists.")
        if not final.exists():
            continue
        if any(path.exists() and final.samefile(path) for path in inputs):
            raise FileError(f"{final} is an input of this call. Write to another file.")
        if not force:
            raise FileError(f"{final} exists already. Give --force to replace it, or another --out.")


class Output:
    """The files of one call on one rank; rank 0 makes, names and removes them."""

    def __init__(self, targets: Sequence[Target], force: bool) -> None:
        self.targets, self.force = targets, force
        self.temporary: list[Path] = []
        self._made: list[Path] = []
        self._descriptors: list[int] = []

    def make(self) -> list[str]:
        """Make the temporary files with their full size, so that a full disk is noticed before any work."""
        for target in self.targets:
            path = target.final.with_name(f".{target.final.name}.{secrets.token_hex(4)}.partial")
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
                self._made.append(path)
                try:
                    _allocate(descriptor, target.size)
                    os.pwrite(descriptor, target.header, 0)
                finally:
                    os.close(descriptor)
            except OSError as exc:
                raise _write_failure(target, exc) from exc
        return [str(path) for path in self._made]

    def open(self, temporary: Sequence[str]) -> None:
        """Open the files that rank 0 made."""
        self.temporary = [Path(path) for path in temporary]
        for path in self.temporary:
            try:
                self._descriptors.append(os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0)))
            except OSError as exc:
                raise FileError(
                    f"{path}, which rank 0 made, cannot be opened here: {exc.strerror}. "
                    "The output must lie in a folder that all ranks share."
                ) from exc

    def write(self, name: str, axis: int, runs: Sequence[range], rows: Array) -> None:
        """Write this rank's rows of the tensor ``name``."""
        for target, descriptor in zip(self.targets, self._descriptors, strict=True):
            for stored in target.tensors:
                if stored.name == name:
                    try:
                        write_rows(descriptor, stored, axis, runs, rows)
                    except OSError as exc:
                        raise _write_failure(target, exc) from exc

    def written(self, name: str) -> Stored:
        """The tensor ``name`` as it now lies in its temporary file."""
        for target, path in zip(self.targets, self.temporary, strict=True):
            for stored in target.tensors:
                if stored.name == name:
                    return replace(stored, path=path)
        raise KeyError(name)

    def settle(self) -> None:
        """Bring what was written to the disk, and close."""
        descriptors, self._descriptors = self._descriptors, []
        for target, descriptor in zip(self.targets, descriptors, strict=True):
            try:
                os.fsync(descriptor)
            except OSError as exc:
                raise _write_failure(target, exc) from exc
            finally:
                os.close(descriptor)

    def name(self) -> None:
        """Give the files that were made here their final names."""
        if not self._made:
            return
        named: list[Path] = []
        try:
            for target, path in zip(self.targets, list(self._made), strict=True):
                if not self.force and target.final.exists():
                    raise FileError(f"{target.final} was made by someone else meanwhile. Give another --out.")
                os.replace(path, target.final)
                self._made.remove(path)
                named.append(target.final)
            folder = os.open(self.targets[0].final.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError:
            for final in named:
                final.unlink(missing_ok=True)
            raise

    def discard(self) -> None:
        """Close what is open and remove what rank 0 made and did not name."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        while self._made:
            self._made.pop().unlink(missing_ok=True)


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (OSError, AttributeError) as exc:  # some file systems cannot, some Pythons neither
        if isinstance(exc, OSError) and exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write_failure(target: Target, error: OSError) -> Failure:
    usage = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
    return Failure(
        f"{target.final} takes {target.size:,} bytes and cannot be written: {error.strerror}. "
        "Nothing is left of it. Free some space there, or choose another folder with --out.",
        2 if usage else 1,
    )


def _safetensors_target(path: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> Target:
    words = {name: word for word, name in NAMES.items()}
    header: dict[str, Any] = {"__metadata__": {"written_by": "ringcore attend"}}
    begin, tensors = 0, []
    # Wider numbers first, as the format's own library does, so that all are aligned.
    for name in sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name)):
        shape, dtype = shapes[name]
        stored = Stored(name, path, begin, shape, dtype)
        header[name] = {
            "dtype": words[dtype.name],
            "shape": list(shape),
            "data_offsets": [begin, begin + stored.nbytes],
        }
        begin += stored.nbytes
        tensors.append(stored)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    front = struct.pack("<Q", len(text)) + text
    return Target(path, front, tuple(replace(stored, offset=stored.offset + len(front)) for stored in tensors))


def _npy_target(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Target:
    front = io.BytesIO()
    description = "<V2" if dtype.name == "bfloat16" else np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(front, {"descr": description, "fortran_order": False, "shape": shape})
    return Target(path, front.getvalue(), (Stored(name, path, len(front.getvalue()), shape, dtype),))
