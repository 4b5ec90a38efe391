"""Layouts and visibilities to plan for, named and drawn at random, and the definition of what is visible."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st
from pairs import Problem

from ringcore.layout import NAMED, Layout
from ringcore.tiling import Visibility

SIGHTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "window left": {"window": (4, None)},
    "window right": {"window": (None, 0)},
    "window itself": {"window": (0, 0)},
    "causal window": {"causal": True, "window": (3, 6)},
    "offset": {"causal": True, "offsets": (6, 6)},
    "negative offset": {"causal": True, "offsets": (-3, -3)},
    "offsets": {"causal": True, "offsets": (9, -2), "window": (7, None)},
    "key lengths": {"key_limits": (4, 13)},
    "no keys": {"key_limits": (0, 0)},
    "causal key lengths": {"causal": True, "key_limits": (11, 7)},
    "one query": {"queries": 1, "causal": True, "offsets": (12, 8)},
    "more queries than keys": {"queries": 19, "keys": 5, "causal": True},
    "more keys than queries": {"queries": 6, "keys": 17, "window": (2, 9)},
    "grouped heads": {"causal": True, "heads": 6, "key_heads": 2},
    "no rows": {"queries": 0, "keys": 0},
}

DEALS = ("contiguous", "zigzag", "striped", "uneven", "mixed", "zigzag q, striped k", "mixed q, uneven k")


def deal(name: str, length: int, size: int) -> Layout:
    """A named layout, or one of our own: uneven and empty shards, or ranges of different steps out of order."""
    if name in NAMED:
        return NAMED[name](length, size)
    rng = random.Random(length * 100 + size)
    if name == "uneven":
        cuts = [0, *sorted(rng.randint(0, length) for _ in range(size - 1)), length]
        return Layout(tuple((range(a, b),) for a, b in pairwise(cuts)))
    half = length // 2
    ranges = [*(range(half + i, length, 3) for i in range(3)), range(0, half, 2), range(1, half, 2)]
    rng.shuffle(ranges)
    return Layout(tuple(tuple(ranges[rank::size]) for rank in range(size)))


def deals(name: str, queries: int, keys: int, size: int) -> tuple[Layout, Layout]:
    """The layouts of q and of k."""
    q_name, _, k_name = name.partition(" q, ")
    return deal(q_name, queries, size), deal(k_name.removesuffix(" k") or q_name, keys, size)


def visibility(queries: int = 13, keys: int = 13, **sight: Any) -> Visibility:
    """A visibility from what differs from "two batch entries, two heads that share one key head, all is visible"."""
    plain = {"causal": False, "window": (None, None), "offsets": (0, 0), "heads": 2, "key_heads": 1}
    return Visibility(**{**plain, "key_limits": (keys,) * len(sight.get("offsets", (0, 0))), **sight})


def sees(visibility: Visibility) -> Callable[[int, int, int, int], bool]:
    """The definition: may query row i see key j?"""

    def visible(entry: int, head: int, i: int, j: int) -> bool:
        left, right = visibility.window
        ahead = j - (i + visibility.offsets[entry])
        if visibility.causal and ahead > 0:
            return False
        if left is not None and ahead < -left:
            return False
        if right is not None and ahead > right:
            return False
        return j < visibility.key_limits[entry]

    return visible


def problem(
    q_layout: Layout, k_layout: Layout, visibility: Visibility, also: Callable[..., int] = lambda *pair: 1, **more: Any
) -> Problem:
    """What plans for this must compute: visible pairs, as often as ``also`` says."""
    visible = sees(visibility)
    rows, keys = (tuple(layout.positions(rank) for rank in range(layout.size)) for layout in (q_layout, k_layout))
    return Problem(
        rows,
        keys,
        lambda *pair: visible(*pair) and also(*pair),
        batch=len(visibility.offsets),
        heads=visibility.heads,
        key_heads=visibility.key_heads,
        offsets=visibility.offsets,
        **more,
    )


@st.composite
def layouts(draw: Any, length: int, size: int) -> Layout:
    """Any partition: the sequence in runs, some runs in stripes, all of it dealt in any order."""
    ranges = []
    start = 0
    while start < length:
        stop = draw(st.integers(start + 1, length))
        step = draw(st.integers(1, 3))
        ranges += [range(start + i, stop, step) for i in range(min(step, stop - start))]
        start = stop
    owners = [draw(st.integers(0, size - 1)) for _ in ranges]
    ranges = draw(st.permutations(ranges))
    return Layout(tuple(tuple(r for r, o in zip(ranges, owners, strict=True) if o == rank) for rank in range(size)))


@st.composite
def calls(draw: Any) -> tuple[Layout, Layout, Visibility]:
    """Layouts of q and k, and a visibility, for rings of up to five ranks."""
    size, queries, keys = draw(st.integers(1, 5)), draw(st.integers(0, 12)), draw(st.integers(0, 12))
    side = st.none() | st.integers(0, 8)
    batch = draw(st.integers(1, 2))
    seen = visibility(
        causal=draw(st.booleans()),
        window=(draw(side), draw(side)),
        offsets=tuple(draw(st.integers(-6, 14)) for _ in range(batch)),
        key_limits=tuple(draw(st.integers(0, keys)) for _ in range(batch)),
        joined=draw(st.booleans()),
    )
    q_layout = draw(layouts(queries, size))
    same = queries == keys and draw(st.booleans())
    return q_layout, q_layout if same else draw(layouts(keys, size)), seen
