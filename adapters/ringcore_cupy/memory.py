"""What is said where a GPU's memory does not suffice for a tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cupy.cuda.memory import OutOfMemoryError

from ringcore import RingcoreError


class TileMemoryError(RingcoreError, OutOfMemoryError):  # type: ignore[misc]
    """A tile's scratch does not fit into the GPU's memory; nothing was computed of it."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)

    def __reduce__(self) -> tuple[type[TileMemoryError], tuple[object, ...]]:
        return type(self), self.args


@contextmanager
def told(rows: int, keys: int, heads: int, scratch: int) -> Iterator[None]:
    """Raise what is missing as TileMemoryError. scratch: how many bytes the tile takes beside its arrays."""
    try:
        yield
    except OutOfMemoryError as exc:
        raise TileMemoryError(
            f"a tile of {rows} rows x {keys} keys with {heads} heads needs {scratch:,} bytes beside its arrays, for "
            f"which the GPU has no room: {exc} Use a larger ring, or free memory with "
            "cupy.get_default_memory_pool().free_all_blocks()."
        ) from exc
