"""One question to an implementation of attention, and how a ring deals it, as NumPy arrays in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ringcore.layout import Layout

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Problem:
    """q, dout [B, H, S, D], k, v [B, Hk, N, D] and what changes scores, in float64.

    before: so many of the first keys are a prefix, which all queries see and nothing is added to; the others are
    positions. shown: by keyword, which query sees which position, [B or 1, H or 1, S, positions]; seen is what all of
    them show. added: by keyword, what is added to scores behind the softcap. window: its sides, if there is one.
    dilation: segment length and rate of each branch, which ``added`` counts.
    sinks: [H]. kept: what dropout multiplies weights with. dlse: the gradient of lse [B, H, S, 1]. All these broadcast.
    """

    q: Floats
    k: Floats
    v: Floats
    dout: Floats
    scale: float
    shown: dict[str, Bools] = field(default_factory=dict)
    added: dict[str, Floats] = field(default_factory=dict)
    before: int = 0
    window: tuple[int | None, int | None] | None = None
    dilation: tuple[tuple[int, int], ...] = ()
    softcap: float | None = None
    sinks: Floats | None = None
    kept: Floats | float = 1.0
    dlse: Floats | float = 0.0

    @property
    def group(self) -> int:
        """How many query heads read one key head."""
        return int(self.q.shape[1] // self.k.shape[1])

    @property
    def positions(self) -> int:
        """How many positions have keys."""
        return int(self.k.shape[2]) - self.before

    @cached_property
    def sees(self) -> Bools:
        """[B, H, S, N]: which query sees which key, by all keywords together."""
        batch, heads, queries, _ = self.q.shape
        sees = np.ones((batch, heads, queries, self.k.shape[2]), bool)
        for each in self.shown.values():
            sees[..., self.before :] &= each
        return sees

    def showing(self, **shown: Bools) -> Problem:
        """The same, if keywords showed this."""
        return replace(self, shown={**self.shown, **shown})

    def without(self, name: str) -> Problem:
        """The same, if there was no such keyword."""
        shown = {each: x for each, x in self.shown.items() if each != name}
        return replace(self, shown=shown, added={each: x for each, x in self.added.items() if each != name})

    @cached_property
    def scores(self) -> Floats:
        """[B, H, S, N], -inf where a query does not see a key."""
        scores = self.raw.copy()
        for each in self.added.values():
            scores[..., self.before :] += each
        return np.where(self.sees, scores, -np.inf)

    @cached_property
    def uncapped(self) -> Floats:
        """The scores of all pairs, before anything happens to them."""
        return np.asarray(np.einsum("bhsd,bhtd->bhst", self.q, self.of_heads(self.k)) * self.scale)

    @cached_property
    def raw(self) -> Floats:
        """The scores of all pairs, by the softcap if there is one, before anything is added or hidden."""
        return self.capped(self.uncapped)

    @property
    def slope(self) -> Floats | float:
        """The derivative of the softcap."""
        return 1.0 if self.softcap is None else 1 - (self.raw / self.softcap) ** 2

    def capped(self, scores: Floats) -> Floats:
        """Scores by the softcap, if there is one."""
        return np.asarray(scores if self.softcap is None else self.softcap * np.tanh(scores / self.softcap))

    def of_heads(self, x: Floats) -> Floats:
        """k or v for every query head."""
        return np.asarray(np.repeat(x, self.group, axis=1))


@dataclass(frozen=True)
class Question:
    """What is asked: a problem, and the keywords that say the same of it, as `ringcore.ring_attention` names them."""

    name: str
    problem: Problem
    keywords: dict[str, Any] = field(default_factory=dict)

    def of_rank(self, dealt: Dealt, rank: int) -> Question:
        """What one rank is given: its rows of q, k, v and dout, and of masks and biases."""
        rows, columns = list(dealt.rows[rank]), list(dealt.columns[rank])
        whole, keywords = self.problem, dict(self.keywords)
        for name in ("mask", "bias"):
            if name in keywords and keywords[name].shape[-2] > 1:
                keywords[name] = keywords[name][..., rows, :]
        columns = [whole.before + column for column in columns]
        mine = replace(
            whole,
            q=whole.q[:, :, rows],
            dout=whole.dout[:, :, rows],
            k=whole.k[:, :, columns],
            v=whole.v[:, :, columns],
            before=0,
        )
        return Question(self.name, mine, keywords)


@dataclass(frozen=True)
class Dealt:
    """Which positions each rank of a ring holds: of queries, and of keys."""

    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    owner: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        owner = {row: rank for rank, rows in enumerate(self.rows) for row in rows}
        object.__setattr__(self, "owner", tuple(owner[row] for row in range(len(owner))))

    @classmethod
    def contiguous(cls, queries: int, keys: int, size: int) -> Dealt:
        """Consecutive positions, evenly; the first ranks have one more."""
        rows, columns = (
            tuple(tuple(map(int, part)) for part in np.array_split(np.arange(length), size))
            for length in (queries, keys)
        )
        return cls(rows, columns)

    @classmethod
    def by(cls, layout: Layout) -> Dealt:
        """Queries and keys by the same layout."""
        shards = tuple(tuple(layout.positions(rank)) for rank in range(layout.size))
        return cls(shards, shards)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.rows)

    def hop(self, number: int) -> tuple[int, ...]:
        """Of each query the rank whose keys it meets in this hop: its own first, then the rank before, and so on."""
        return tuple((rank - number) % self.size for rank in self.owner)

    def keys_of_hop(self, number: int, keys: int) -> Bools:
        """[S, N]: which keys each query meets in this hop."""
        return np.asarray(np.array(self.hop(number))[:, None] == self.holder(keys)[None, :])

    def holder(self, keys: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[N]: the rank that holds each key."""
        holder = np.empty(keys, np.int64)
        for rank, columns in enumerate(self.columns):
            holder[list(columns)] = rank
        return holder
