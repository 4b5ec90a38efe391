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

    def of(self, tile: Tile, batch: int, rows: int, keys: int, device: torch.device) -> dict[str, Any]:
        """The keywords of the parts of all entries end to end, with sequences of rows or of keys alone between them.

        Raises UnsupportedError in a capture of a tile that never ran: making them is no work of a stream.
        """
        parts = tuple((mine.start, mine.stop, theirs.start, theirs.stop) for _, mine, theirs in tile.places())
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
