"""Tensors in .safetensors and .npy files: only the rows that are asked for are read, and no file is mapped."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ringcore.errors import FileError
from ringcore.values import Array

NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool"}
"""What a .safetensors file calls the dtypes that are read here."""

CHUNK = 4 << 20  # bytes of a file that are held beside the arrays
_HEADER = 100_000_000  # the largest header that the format allows
_GAP = 32768  # rows of a stripe at most this many bytes apart are read with what lies between them
_PAGE = 4096


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes begin and what they mean. Its order is C order."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self.dtype.itemsize


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name, bfloat16 among them."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def open_tensor(path: Path, name: str) -> Stored:
    """The tensor ``name`` of a .safetensors file, or the array of a .npy file.

    Raises FileError if the file is missing, damaged, truncated or lacks the tensor.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if path.suffix == ".npy":
                stored = _open_npy(file, path, name)
            elif path.suffix == ".safetensors":
                stored = _open_safetensors(file, path, name, size)
            else:
                raise FileError(
                    f"{path} is neither a .safetensors nor a .npy file. Give a file with one of these endings."
                )
    except OSError as exc:
        if isinstance(exc, FileError):
            raise
        raise FileError(f"{path} cannot be read: {exc.strerror}.") from exc
    if stored.offset + stored.nbytes > size:
        raise FileError(
            f"{path} is truncated: {name} of shape {list(stored.shape)} {stored.dtype} ends at byte "
            f"{stored.offset + stored.nbytes}, but the file has {size}. Write or copy it again."
        )
    return stored


def read_rows(stored: Stored, axis: int, runs: Sequence[range], into: Array) -> None:
    """Read the rows at ``runs`` of axis ``axis`` into ``into``, one after the other, in its dtype.

    into: an array, of any strides, with the tensor's axes; along ``axis`` it has as many rows as the runs.
    Raises FileError if the file ends early.
    """
    tail = stored.shape[axis + 1 :]
    row = prod(tail) * stored.dtype.itemsize
    if into.size == 0:
        return
    scratch = np.empty(max(CHUNK, row), dtype=np.uint8)
    with stored.path.open("rb") as file:
        for lead in np.ndindex(*stored.shape[:axis]):
            start = stored.offset + _flat(lead, stored.shape[:axis]) * stored.shape[axis] * row
            part, done = into[lead], 0
            for run in runs:
                span = row * run.step
                together = CHUNK // span if run.step == 1 or (row < _PAGE and span <= _GAP) else 1
                together = max(1, together)
                for first in range(0, len(run), together):
                    some = run[first : first + together]
                    target = part[done : done + len(some)]
                    done += len(some)
                    if run.step == 1 and target.flags.c_contiguous and target.dtype == stored.dtype:
                        _fill(file.fileno(), _bytes_of(target), start + some[0] * row, stored)
                        continue
                    held = scratch[: (some[-1] - some[0] + 1) * row]
                    _fill(file.fileno(), _bytes_of(held), start + some[0] * row, stored)
                    target[...] = held.view(stored.dtype).reshape(-1, *tail)[:: run.step]


def write_rows(descriptor: int, stored: Stored, axis: int, runs: Sequence[range], rows: Array) -> None:
    """Write ``rows`` to the places of the rows at ``runs`` of axis ``axis``: the inverse of `read_rows`."""
    row = prod(stored.shape[axis + 1 :]) * stored.dtype.itemsize
    if rows.size == 0:
        return
    together = max(1, CHUNK // row)
    for lead in np.ndindex(*stored.shape[:axis]):
        start = stored.offset + _flat(lead, stored.shape[:axis]) * stored.shape[axis] * row
        part, done = rows[lead], 0
        for run in runs:
            for first in range(0, len(run), together):
                some = run[first : first + together]
                chunk = np.ascontiguousarray(part[done : done + len(some)], dtype=stored.dtype)
                done += len(some)
                data = _bytes_of(chunk)
                if run.step == 1:
                    _pour(descriptor, data, start + some[0] * row)
                    continue
                for index, position in enumerate(some):
                    _pour(descriptor, data[index * row : (index + 1) * row], start + position * row)


def _open_safetensors(file: Any, path: Path, name: str, size: int) -> Stored:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER + 1
    if length > min(_HEADER, size - 8):
        raise FileError(
            f"{path} is no whole .safetensors file: its header does not fit in its {size} bytes. Write it again."
        )
    try:
        header = json.loads(file.read(length))
        names = sorted(key for key in header if key != "__metadata__")
        if name not in header:
            raise FileError(
                f"{path} has no tensor {name!r}; it holds {', '.join(names) or 'none'}. "
                "Name the tensors with --q-name, --k-name and --v-name."
            )
        entry = header[name]
        dtype, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise FileError(f"{path} has a damaged .safetensors header ({exc}). Write the file again.") from exc
    if dtype not in NAMES:
        raise FileError(f"{name} in {path} holds {dtype}; it must be one of {', '.join(NAMES)}. Convert it first.")
    stored = Stored(name, path, 8 + length + int(begin), shape, dtype_of(NAMES[dtype]))
    if min(shape, default=0) < 0 or begin < 0 or end - begin != stored.nbytes:
        raise FileError(
            f"{path} has a damaged .safetensors header: {name} of shape {list(shape)} {dtype} takes "
            f"{stored.nbytes} bytes, but bytes {begin} to {end} are set aside for it. Write the file again."
        )
    return stored


def _open_npy(file: Any, path: Path, name: str) -> Stored:
    formats = np.lib.format
    readers = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
    try:
        version = formats.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = readers[version](file)
    except ValueError as exc:
        raise FileError(f"{path} is no .npy file that can be read here ({exc}). Write it with numpy.save.") from exc
    if dtype == np.dtype("V2"):  # NumPy's files have no word for bfloat16, and this is what it writes
        dtype = dtype_of("bfloat16")
    if dtype.name not in NAMES.values():
        raise FileError(
            f"{name} in {path} holds {dtype}; it must be one of {', '.join(NAMES.values())}. Convert it first."
        )
    if fortran and sum(length > 1 for length in shape) > 1:
        raise FileError(f"{path} is in Fortran order. Save numpy.ascontiguousarray(x): rows must lie in one piece.")
    return Stored(name, path, file.tell(), shape, dtype)


def _flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    place = 0
    for i, length in zip(index, shape, strict=True):
        place = place * length + i
    return place


def _bytes_of(x: Array) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(x.reshape(-1).view(np.uint8))


def _fill(descriptor: int, view: memoryview, offset: int, stored: Stored) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise FileError(
                f"{stored.path} ends at byte {offset + done}, within {stored.name}: it was truncated just now."
            )
        done += count


def _pour(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)
