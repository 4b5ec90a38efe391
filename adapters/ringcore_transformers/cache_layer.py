"""The keys and values of one layer, of which this process holds the positions that are dealt to it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from ringcore import KeywordError, ShapeError, UnsupportedError

GROWTH = 1.25  # of the room for positions: more would copy less often, but keep more room that nobody needs yet


class CacheReadError(UnsupportedError, AttributeError):
    """A model looked into what a RingCache gave it, as if all keys were there."""


@dataclass(frozen=True, eq=False)
class NewKeys:
    """What a RingCache gives a model in the place of all keys and all values: the new ones, and where they belong.

    Attention writes them, for it alone knows the ring, and there the ranks agree. Whoever else looks is refused.
    """

    layer: RingCacheLayer
    keys: torch.Tensor
    values: torch.Tensor

    def __getattr__(self, name: str) -> NoReturn:
        raise CacheReadError(_seen_by_another(f"reads {name!r} of"))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise CacheReadError(_seen_by_another(f"calls {getattr(function, '__name__', function)} with"))


def _seen_by_another(what: str) -> str:
    return (
        f"the model {what} the keys or values of a RingCache, of which each rank has its own positions alone. Use an "
        "attn_implementation that ringcore_transformers.register made, or another cache."
    )


@dataclass(frozen=True)
class Held:
    """What decoding takes: this rank's keys and values [B, Hk, R, width], R equal on all ranks, and who sees what."""

    keys: torch.Tensor
    values: torch.Tensor
    key_lengths: tuple[int, ...]
    query_offset: tuple[int, ...]


class RingCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """One layer of a `RingCache`.

    Columns are the places of tokens as a model counts them, padding on the left included. Positions are counted in each
    batch entry from its first token; padding is not kept. Position p lies on rank p modulo the number of ranks, there
    at place (p - start) divided by it; places that were not written yet are not read.

    length: the columns so far, over all ranks. padding: of each batch entry the columns of padding on its left.
    start: the first position that is kept, a multiple of the number of ranks. reach: how many positions before its own
    a query sees, None for all. confirmed: the columns that no `crop` will take back, if record_past.
    """

    is_compileable = False
    is_sliding = False  # what it reports is of the whole sequence, also where a window drops positions
    is_croppable = True
    supports_early_init = False  # how much room a rank needs depends on the ring, which attention knows

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Any = None  # tensors [B, Hk, places, width], once something was written
        self.values: Any = None
        self.is_initialized = False
        self.length = self.start = self.confirmed = 0
        self.padding: tuple[int, ...] = ()
        self.seat = 0, 1
        self.reach: int | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: room is made as positions are written."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        """The new keys and values, twice, for attention, which writes them; until then they do not count."""
        new = NewKeys(self, key_states, value_states)
        return new, new

    def write(self, new: NewKeys, padding: tuple[int, ...], rank: int, size: int, reach: int | None) -> Held:
        """This rank's part of all positions with the new ones, which do not count yet: `keep` says when.

        Raises ShapeError and KeywordError for what does not fit what is here already.
        """
        self._check(new, padding, (rank, size))
        self.padding, self.seat, self.reach = padding, (rank, size), reach
        stop = self.length + new.keys.shape[2]
        self._make_room(new, stop)
        first = 0
        for columns, run in groupby(padding):  # batch entries of equal padding share their places
            batch = slice(first, first := first + len(list(run)))
            begin = max(self.length - columns, 0)
            mine = range(begin + (rank - begin) % size, stop - columns, size)
            place, column = (mine.start - self.start) // size, mine.start + columns - self.length
            self.keys[batch, :, place : place + len(mine)] = new.keys[batch, :, column::size]
            self.values[batch, :, place : place + len(mine)] = new.values[batch, :, column::size]
        rows = self._rows(stop)
        return Held(
            self.keys[:, :, :rows], self.values[:, :, :rows],
            key_lengths=tuple(stop - columns - self.start for columns in padding),
            query_offset=tuple(self.length - columns - self.start for columns in padding),
        )  # fmt: skip

    def keep(self, new: NewKeys) -> None:
        """What was written counts from now on."""
        self.length += new.keys.shape[2]

    def _check(self, new: NewKeys, padding: tuple[int, ...], seat: tuple[int, int]) -> None:
        if self.keys is None:
            return
        for held, x, what in ((self.keys, new.keys, "keys"), (self.values, new.values, "values")):
            if (held.shape[:2], held.shape[3], held.dtype) != (x.shape[:2], x.shape[3], x.dtype):
                raise ShapeError(
                    f"the cache holds {what} of {tuple(held.shape)} as [B, H, places, width] and {held.dtype}, but the "
                    f"new ones have shape {tuple(x.shape)} and {x.dtype}. Make a RingCache for each batch, or reset it."
                )
        # An entry of which nothing but padding came so far may have more of it.
        same = all(x == y or y == self.length < x for x, y in zip(padding, self.padding, strict=True))
        if not same or seat != self.seat:
            raise KeywordError(
                f"the cache was filled with a padding of {list(self.padding)} on the left, as rank {self.seat[0]} of "
                f"{self.seat[1]}, but goes on with {list(padding)} as rank {seat[0]} of {seat[1]}. Give the whole "
                "attention_mask at every step, and one ring to a RingCache."
            )

    def _make_room(self, new: NewKeys, stop: int) -> None:
        """Places for the positions up to column ``stop``; those that a window hides for good are dropped then."""
        if self.keys is not None and self._rows(stop) <= self.keys.shape[2]:
            return
        filled, start = self._rows(self.length), self.start
        self.start = max(start, self._first_seen(self.confirmed if self.record_past else self.length))
        rows = self._rows(stop)
        room = rows if self.keys is None else max(rows, int(rows * GROWTH))
        kept = slice((self.start - start) // self.seat[1], filled)
        self.keys = _moved(self.keys, kept, new.keys, room)
        self.values = _moved(self.values, kept, new.values, room)
        self.is_initialized = True

    def _rows(self, stop: int) -> int:
        """How many places a rank needs for the positions up to column ``stop``, every rank the same."""
        return max(0, -((self.start + min(self.padding, default=0) - stop) // self.seat[1]))

    def _first_seen(self, column: int) -> int:
        """The first position that the queries from ``column`` on see, rounded down to where a round of cards begins."""
        if self.reach is None:
            return 0
        size = self.seat[1]
        return max(0, column - max(self.padding, default=0) - self.reach) // size * size

    def get_seq_length(self) -> int:
        """The columns so far, over all ranks."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns there are with the new ones, and the first of them, 0."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no longest length."""
        return -1

    get_max_cache_shape = get_max_length  # its name until transformers 5.16

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: so many if the number is negative, all from that one on if it is positive.

        Raises UnsupportedError if a window has dropped what would be seen again.
        """
        count = int(tokens_to_remove)  # transformers counts in tensors, too
        kept = min(self.length, count if count > 0 else self.length + count)
        if kept <= 0:
            self.reset()
            return
        if self._first_seen(kept) < self.start:
            raise UnsupportedError(
                f"the cache cannot go back from {self.length} to {kept} tokens: its window has dropped the positions "
                f"before {self.start}. Call the cache's activate_past_recording() before."
            )
        self.length = self.confirmed = kept

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Batch entry i becomes a copy of entry ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch entry becomes ``repeats`` of them."""
        self.batch_select_indices(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these batch entries, in this order."""
        if self.keys is None:
            return
        self.keys, self.values = (x[indices.to(x.device)] for x in (self.keys, self.values))
        chosen = torch.arange(len(self.padding))[indices.cpu()]
        self.padding = tuple(self.padding[entry] for entry in chosen.tolist())


def _moved(held: torch.Tensor | None, kept: slice, like: torch.Tensor, room: int) -> torch.Tensor:
    """[B, H, room, width] that begins with the kept places."""
    moved = like.new_empty((*like.shape[:2], room, like.shape[3]))
    if held is not None:
        part = held[:, :, kept]
        moved[:, :, : part.shape[2]] = part
    return moved
