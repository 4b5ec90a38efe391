"""What is raised where memory does not suffice."""

from __future__ import annotations


class OutOfMemoryError(MemoryError):
    def __init__(self, size, total, limit=0):
        self._size, self._total, self._limit = size, total, limit
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")

    def __reduce__(self):
        return type(self), (self._size, self._total, self._limit)
