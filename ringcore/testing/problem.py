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

    sees: which query sees which key, [B or 1, H or 1, S, N]. sinks: [H], or None.
    """

    q: Floats
    k: Floats
    v: Floats
    dout: Floats
    scale: float
    sees: Bools
    softcap: float | None = None
    sinks: Floats | None = None

    @property
    def group(self) -> int:
        """How many query heads read one key head."""
        return int(self.q.shape[1] // self.k.shape[1])

    @cached_property
    def scores(self) -> Floats:
        """[B, H, S, N], -inf where a query does not see a key."""
        return np.where(self.sees, self.raw, -np.inf)

    @cached_property
    def raw(self) -> Floats:
        """The scores of all pairs."""
        return self.capped(np.einsum("bhsd,bhtd->bhst", self.q, self.of_heads(self.k)) * self.scale)

    def capped(self, scores: Floats) -> Floats:
        """Scores by the softcap, if there is one."""
        return np.asarray(scores if self.softcap is None else self.softcap * np.tanh(scores / self.softcap))

    def of_heads(self, x: Floats) -> Floats:
        """k or v for every query head."""
        return np.asarray(np.repeat(x, self.group, axis=1))

    def seeing(self, sees: Bools) -> Problem:
        """The same with other pairs visible."""
        return replace(self, sees=np.broadcast_to(sees, self.sees.shape))


@dataclass(frozen=True)
class Question:
    """What is asked: a problem, and the keywords that say the same of it, as `ringcore.ring_attention` names them."""

    name: str
    problem: Problem
    keywords: dict[str, Any] = field(default_factory=dict)

    def of_rank(self, dealt: Dealt, rank: int) -> Question:
        """What one rank is given: its rows of q, k, v and dout, and of a mask."""
        rows, columns = list(dealt.rows[rank]), list(dealt.columns[rank])
        whole, keywords = self.problem, dict(self.keywords)
        if "mask" in keywords:
            keywords["mask"] = keywords["mask"][rows]
        mine = replace(
            whole,
            q=whole.q[:, :, rows],
            dout=whole.dout[:, :, rows],
            k=whole.k[:, :, columns],
            v=whole.v[:, :, columns],
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
        holder = np.empty(keys, int)
        for rank, columns in enumerate(self.columns):
            holder[list(columns)] = rank
        return np.asarray(np.array(self.hop(number))[:, None] == holder[None, :])
