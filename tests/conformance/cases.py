"""Which rows of the table of keywords a session runs, with which layouts, ring sizes, shapes and dtypes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

import ringcore
from ringcore.testing import table
from ringcore.testing.table import FEATURES, Keywords, Shape

SHAPES = {
    "square": Shape(1, 2, 2, 37, 37, 8, 8),
    "grouped": Shape(2, 4, 2, 29, 29, 6, 5),
    "rectangular": Shape(2, 2, 1, 11, 31, 4, 3),
    "tiny": Shape(1, 2, 2, 3, 3, 1, 2),
}
# Shapes with the widths that fused kernels for GPUs take.
FUSED_SHAPES = {
    "aligned": Shape(2, 4, 2, 45, 45, 16, 16),
    "long aligned": Shape(1, 2, 1, 300, 300, 64, 64),
    "rectangular aligned": Shape(2, 2, 2, 24, 50, 8, 16),
}

SHAPES_OF_ALL = {**SHAPES, **FUSED_SHAPES}

LAYOUTS = ("contiguous", "zigzag", "striped", "uneven", "mixed", "zigzag and striped")
RING_SIZES = (1, 2, 3, 4, 5, 6, 7, 8)
DTYPES = ("float64", "float32")
HALF_DTYPES = ("float16", "bfloat16")
AXES = ("bhsd", "bshd")


def layouts_for(case: Case) -> dict[str, str | ringcore.Layout]:
    """The layout of q, k and v, or those of q and of k and v, as the keywords that say so."""
    of_q, _, of_k = case.layout.partition(" and ")
    if of_k:
        return {"q_layout": of_q, "k_layout": of_k}
    return {"layout": layout_for(case.layout, SHAPES_OF_ALL[case.shape].keys, case.size)}


def layout_for(name: str, length: int, size: int) -> str | ringcore.Layout:
    """A named layout, or one of our own: uneven and empty shards, or ranges of different steps out of order."""
    if name == "uneven":
        rng = random.Random(length * 100 + size)
        cuts = sorted(rng.randint(0, length) for _ in range(size - 1))
        ends = [*cuts, length]
        return ringcore.Layout(tuple((range(a, b),) for a, b in zip([0, *cuts], ends, strict=True)))
    if name == "mixed":
        half = length // 2
        ranges = [
            range(half, length, 3),
            range(0, half, 2),
            range(half + 2, length, 3),
            range(1, half, 2),
            range(half + 1, length, 3),
        ]
        return ringcore.Layout(tuple(tuple(ranges[rank::size]) for rank in range(size)))
    return name


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    feature: str
    layout: str
    size: int
    shape: str
    dtype: str
    axes: str = "bhsd"

    def __str__(self) -> str:
        return "-".join(
            str(x).replace(" ", "_") for x in (self.feature, self.layout, self.size, self.shape, self.dtype, self.axes)
        )


AXES_OF_TABLE = (tuple(FEATURES), LAYOUTS, RING_SIZES, tuple(SHAPES), DTYPES)


def every_case() -> list[Case]:
    """The full product; the order of axes alternates."""
    return [
        _possible(Case(*row, AXES[i % 2])) for i, row in enumerate(product(*AXES_OF_TABLE)) if _possible(Case(*row))
    ]


def pairwise_cases(sizes: tuple[int, ...] = RING_SIZES, seed: int = 7) -> list[Case]:
    """Few cases in which every pair of choices on two axes of the table occurs."""
    axes = (*AXES_OF_TABLE[:2], sizes, *AXES_OF_TABLE[3:], AXES)
    rng = random.Random(seed)
    wanted = {((i, a), (j, b)) for i, j in combinations(range(len(axes)), 2) for a in axes[i] for b in axes[j]}
    found = []
    while wanted:
        best, best_gain = None, -1
        # The first open pair is always in, the rest is the best of a few random tries.
        (i, a), (j, b) = min(wanted, key=str)
        for _ in range(30):
            row = [rng.choice(choices) for choices in axes]
            row[i], row[j] = a, b
            gain = sum(((x, row[x]), (y, row[y])) in wanted for x, y in combinations(range(len(axes)), 2))
            if gain > best_gain:
                best, best_gain = row, gain
        wanted -= {((x, best[x]), (y, best[y])) for x, y in combinations(range(len(axes)), 2)}
        found.append(_possible(Case(*best)))
    return found


def few_cases(sizes: tuple[int, ...], dtypes: tuple[str, ...] = DTYPES) -> list[Case]:
    """Every keyword once, the other axes in turn."""
    axes = (LAYOUTS, sizes, tuple(SHAPES), dtypes, AXES)
    return [
        _possible(
            Case(
                feature,
                *(choices[(i * (place + 1) + i // len(choices)) % len(choices)] for place, choices in enumerate(axes)),
            )
        )
        for i, feature in enumerate(FEATURES)
    ]


def half_cases(sizes: tuple[int, ...]) -> list[Case]:
    """Every keyword once in each half type."""
    return [case for dtype in HALF_DTYPES for case in few_cases(sizes, (dtype,))]


def either_half_cases(sizes: tuple[int, ...]) -> list[Case]:
    """Every keyword once in either half type."""
    both = zip(*(few_cases(sizes, (dtype,)) for dtype in HALF_DTYPES), strict=True)
    return [pair[place % len(pair)] for place, pair in enumerate(both)]


def half_layout_cases(sizes: tuple[int, ...]) -> list[Case]:
    """Causal half types on every layout: tiles that fused kernels take whole or in part."""
    few = [size for size in sizes if 1 < size <= 3]
    return [Case("causal", *row, "grouped", dtype) for dtype, *row in product(HALF_DTYPES, LAYOUTS, few)]


def fused_cases(sizes: tuple[int, ...]) -> list[Case]:
    """Every keyword in half types and the shapes that fused kernels for GPUs take."""
    return [
        _possible(Case(feature, layout, size, shape, dtype, AXES[i % 2]))
        for i, (feature, shape) in enumerate(product(FEATURES, FUSED_SHAPES))
        for layout, size, dtype in zip(
            (LAYOUTS[i % len(LAYOUTS)], LAYOUTS[(i + 2) % len(LAYOUTS)]),
            (sizes[i % len(sizes)], sizes[(i + 1) % len(sizes)]),
            HALF_DTYPES,
            strict=True,
        )
    ]


def _possible(case: Case) -> Case:
    # Layouts of our own fix one length, and dilated attention is of one sequence: they go with square shapes.
    square = case.layout in ("uneven", "mixed") or case.feature.startswith("dilated")
    if square and case.shape.startswith("rectangular"):
        shape = "grouped" if case.shape in SHAPES else "aligned"
        return Case(case.feature, case.layout, case.size, shape, case.dtype, case.axes)
    return case


def draw(case: Case) -> tuple[dict[str, np.ndarray], Keywords]:
    """Seeded inputs and keywords of a case; numbers do not depend on layout or ring size."""
    rng = np.random.default_rng([len(case.shape), len(case.feature), sum(map(ord, case.feature))])
    return table.draw(case.feature, rng, SHAPES_OF_ALL[case.shape], case.dtype)
