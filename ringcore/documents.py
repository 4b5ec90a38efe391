"""Packed documents: sequences that share one axis, and see nothing of each other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

from ringcore.errors import KeywordError
from ringcore.integers import integers, is_integer

Runs: TypeAlias = tuple[tuple[int, int, int], ...]
"""Stretches of positions (start, stop, document), which follow each other from position 0 on."""


@dataclass(frozen=True)
class Documents:
    """Which positions are of which document: ``runs`` once for all batch entries, or for each of them.

    What ``documents=`` and ``cu_seqlens=`` are turned into in every call; as ``documents=`` it saves that.
    Raises KeywordError if the runs do not follow each other.
    """

    runs: tuple[Runs, ...]

    def __post_init__(self) -> None:
        for runs in self.runs:
            ends = [0, *(stop for _, stop, _ in runs)]
            for end, (start, stop, document) in zip(ends, runs, strict=False):
                if start != end or stop <= start:
                    raise KeywordError(
                        f"a run of document {document} goes from {start} to {stop}, after one that ends at {end}: runs "
                        "follow each other from 0 on, and none is empty."
                    )
        if len({runs[-1][1] if runs else 0 for runs in self.runs}) != 1:
            raise KeywordError("the batch entries have documents of different lengths in all; all end where keys end.")

    @classmethod
    def from_ids(cls, ids: Any) -> Documents:
        """From the document's id at each position, host integers [N] or [B, N]; equal ids are one document.

        Raises KeywordError for anything else.
        """
        entries = _listed(ids)
        if entries and hasattr(entries[0], "__len__") and not is_integer(entries[0]):
            return _of_ids(tuple(tuple(integers("documents", entry, _IDS)) for entry in entries))
        return _of_ids((tuple(integers("documents", entries, _IDS)),))

    @classmethod
    def from_cu_seqlens(cls, ends: Any) -> Documents:
        """From where documents begin and end, host integers 0, ..., N: those of flash-attn, for all batch entries.

        Raises KeywordError if they do not begin with 0 and rise.
        """
        found = integers("cu_seqlens", ends, "it must hold the integers at which documents begin and end, from 0 on")
        if not found or found[0] != 0:
            raise KeywordError(f"cu_seqlens is {found}; it must begin with 0, where the first document does.")
        for document, (start, stop) in enumerate(pairwise(found)):
            if stop <= start:
                what = "is empty" if stop == start else "ends before it begins"
                raise KeywordError(
                    f"cu_seqlens goes from {start} to {stop}: document {document} {what}. The numbers must rise."
                )
        return cls((tuple((start, stop, document) for document, (start, stop) in enumerate(pairwise(found))),))

    @property
    def length(self) -> int:
        """How many positions there are."""
        runs = self.runs[0]
        return runs[-1][1] if runs else 0

    def of_entries(self, batch: int) -> tuple[Runs, ...]:
        """The runs of each of ``batch`` entries."""
        return self.runs * batch if len(self.runs) == 1 else self.runs

    def local_positions(self, positions: Sequence[int], entry: int = 0) -> list[int]:
        """For each position its place in its document, from 0: position ids for rotary embeddings.

        positions: those of a rank, ``layout.positions(rank)``. entry: of the batch.
        """
        runs = self.runs[entry if len(self.runs) > 1 else 0]
        before: dict[int, int] = {}
        places: list[range] = []
        for start, stop, document in runs:
            first = before.get(document, 0)
            places.append(range(first, first + stop - start))
            before[document] = first + stop - start
        starts = [start for start, _, _ in runs]
        found = []
        for position in positions:
            run = bisect_right(starts, position) - 1
            found.append(places[run][position - starts[run]])
        return found


def read_documents(documents: Any, cu_seqlens: Any) -> Documents | None:
    """What the two keywords say; None if neither was given. Raises KeywordError for what they cannot mean."""
    if documents is not None and cu_seqlens is not None:
        raise KeywordError("documents and cu_seqlens came together; both say where documents begin. Give one.")
    if cu_seqlens is not None:
        return Documents.from_cu_seqlens(cu_seqlens)
    return documents if documents is None or isinstance(documents, Documents) else Documents.from_ids(documents)


_IDS = "it must hold one integer for each key, or for each batch entry and key"


def _listed(ids: Any) -> Sequence[Any]:
    """An array of ids as (nested) lists: plans are made on the host."""
    if getattr(ids, "ndim", 1) not in (1, 2):
        raise KeywordError(f"documents has {ids.ndim} axes; {_IDS}.")
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise KeywordError(f"documents is {ids!r}; {_IDS}.")
    return ids


@lru_cache(maxsize=8)  # they may be long
def _of_ids(entries: tuple[tuple[int, ...], ...]) -> Documents:
    if len({len(ids) for ids in entries}) > 1:
        raise KeywordError(f"documents has rows of {', '.join(str(len(ids)) for ids in entries)} ids; {_IDS}.")
    return Documents(tuple(map(_runs, entries)))


def _runs(ids: Sequence[int]) -> Runs:
    starts = [place for place, (before, document) in enumerate(pairwise(ids), 1) if before != document]
    ends = [0, *starts, len(ids)] if ids else [0]
    return tuple((start, stop, ids[start]) for start, stop in pairwise(ends))
