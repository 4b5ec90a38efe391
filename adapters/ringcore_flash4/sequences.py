"""Where the parts of a tile begin and end, as flash-attn-4 takes sequences of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ringcore import Tile, UnsupportedError

_KEPT = 4096  # tiles whose places are remembered, a few hundred bytes each

_Parts = tuple[tuple[int, int, int, int], ...]


class Sequences:
    """Places on the device, made once for each tile.

    capturing: whether work is recorded for a graph, which holds addresses alone: what it was given is kept for ever.
    """

    def __init__(self, capturing: Callable[[], bool]) -> None:
        self._capturing = capturing
        self._known: dict[tuple[_Parts, int, int, int, torch.device], dict[str, Any]] = {}
        self._captured: list[dict[str, Any]] = []
        self._parts: dict[int, tuple[Tile, _Parts]] = {}

    def of(self, tile: Tile, batch: int, rows: int, keys: int, device: torch.device) -> dict[str, Any]:
        """The keywords of the parts of all entries end to end, with sequences of rows or of keys alone between them.

        Raises UnsupportedError in a capture of a tile that never ran: making them is no work of a stream.
        """
        parts = self._parts_of(tile)
        key = parts, batch, rows, keys, device
        found, capturing = self._known.get(key), self._capturing()
        if found is None:
            if capturing:
                raise UnsupportedError(
                    "many rectangles in one launch were captured before they ever ran, but to tell a GPU where they "
                    "lie is no work of a stream. Run the call once, then capture it."
                )
            if len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            with torch.inference_mode(False):
                found = self._known[key] = _made(parts, batch, rows, keys, device)
        if capturing:
            self._captured.append(found)
        return found

    def equal(self, tile: Tile, rows: int, keys: int) -> int:
        """How many parts the tile has, if they are all of one height and one width and leave no gaps; else 0."""
        parts = self._parts_of(tile)
        row, row_end, key, key_end = parts[0]
        height, width = row_end - row, key_end - key
        # They follow each other, so that those of one size that add up to all leave nothing between them.
        if (len(parts) * height, len(parts) * width) != (rows, keys):
            return 0
        return len(parts) if all((b - a, d - c) == (height, width) for a, b, c, d in parts) else 0

    def _parts_of(self, tile: Tile) -> _Parts:
        """Where each part lies in the tile: remembered, for plans are, and this takes a microsecond or more a part."""
        found = self._parts.get(id(tile))
        if found is None:
            if len(self._parts) >= _KEPT:
                del self._parts[next(iter(self._parts))]
            parts = tuple((mine.start, mine.stop, theirs.start, theirs.stop) for _, mine, theirs in tile.places())
            found = self._parts[id(tile)] = tile, parts  # with the tile, so that no other gets its id
        return found[1]


def _made(parts: _Parts, batch: int, rows: int, keys: int, device: torch.device) -> dict[str, Any]:
    q_ends, k_ends = [0], [0]
    for entry in range(batch):
        for row, row_end, key, key_end in (*parts, (rows, rows, keys, keys)):
            for q_end, k_end in ((row, None), (None, key), (row_end, key_end)):
                q_ends.append(q_ends[-1] if q_end is None else entry * rows + q_end)
                k_ends.append(k_ends[-1] if k_end is None else entry * keys + k_end)
    steps = [(b - a, d - c) for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)]
    kept = [place for place, (height, width) in enumerate(steps) if height or width]
    return {
        "cu_seqlens_q": torch.tensor([0, *(q_ends[place + 1] for place in kept)], dtype=torch.int32, device=device),
        "cu_seqlens_k": torch.tensor([0, *(k_ends[place + 1] for place in kept)], dtype=torch.int32, device=device),
        "max_seqlen_q": max(height for height, _ in steps),
        "max_seqlen_k": max(width for _, width in steps),
    }
