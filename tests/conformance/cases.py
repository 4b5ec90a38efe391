"""The conformance table: every keyword, layout, ring size, shape and dtype, and which combinations a session runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np

import ringcore


@dataclass(frozen=True)
class Shape:
    """Batch, query heads, key heads, queries, keys, key width, value width."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    value_width: int


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

Keywords = dict[str, Any]
Feature = Callable[[np.random.Generator, Shape, str], Keywords]


def _bias(rng, shape, dtype):
    return {"bias": rng.standard_normal((shape.batch, shape.heads, shape.queries, shape.keys)).astype(dtype)}


def _hiding_bias(rng, shape, dtype):
    bias = rng.standard_normal((shape.queries, shape.keys))
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    bias[shape.queries // 2] = -np.inf
    return {"bias": bias.astype(dtype)}


def _finfo_bias(rng, shape, dtype):
    # The mask of many model libraries: the most negative number, and whole rows of nothing else.
    smallest = float(ml_dtypes.finfo(dtype).min)
    bias = np.where(rng.random((shape.batch, 1, shape.queries, shape.keys)) < 0.4, smallest, 0.0)
    bias[:, :, shape.queries // 2] = smallest
    return {"bias": bias.astype(dtype), "causal": True}


def _mask(rng, shape, dtype):
    mask = rng.random((shape.batch, shape.heads, shape.queries, shape.keys)) < 0.6
    mask[:, :, 0] = False
    return {"mask": mask}


def _documents(rng, shape, dtype):
    cuts = sorted(rng.integers(0, shape.keys, 3))
    return {"documents": np.searchsorted(cuts, np.arange(shape.keys), side="right"), "causal": True}


def _documents_of_entries(rng, shape, dtype):
    # Runs of any ids, which come back: equal ones are one document.
    runs = rng.integers(0, 3, (shape.batch, shape.keys // 4 + 1))
    return {"documents": np.repeat(runs, 4, axis=1)[:, : shape.keys]}


def _cu_seqlens(rng, shape, dtype):
    cuts = [0, shape.keys // 4, shape.keys // 4 + 1, shape.keys]
    offset = shape.keys - shape.queries
    return {"cu_seqlens": sorted(set(cuts)), "window": (6, 2), "query_offset": offset // 2}


def _sinks(rng, shape, dtype):
    sinks = 2 * rng.standard_normal(shape.heads)
    sinks[0] = 4.0  # larger than most scores
    return {"sinks": sinks.astype(dtype), "causal": True}


def _sinks_alone(rng, shape, dtype):
    # Rows that see no key, and a head without a sink.
    sinks = np.append(rng.standard_normal(shape.heads - 1), -np.inf)
    lengths = [max(0, shape.keys - 20 * entry - 20) for entry in range(shape.batch)]
    return {"sinks": sinks.astype(dtype), "window": (8, 3), "key_lengths": lengths}


def _prefix_of(rng, shape, dtype, length):
    heads = shape.batch, shape.key_heads, length
    return tuple(rng.standard_normal((*heads, width)).astype(dtype) for width in (shape.width, shape.value_width))


def _prefix(rng, shape, dtype):
    # Every query sees it, those too that see nothing else.
    return {"prefix": _prefix_of(rng, shape, dtype, 7), "window": (4, 0), "query_offset": shape.keys - 2}


def _prefix_reduced(rng, shape, dtype):
    return {
        "prefix": _prefix_of(rng, shape, dtype, 3), "causal": True, "softcap": 2.0, "reduce_replicated": True,
        "bias": rng.standard_normal((1, shape.heads, 1, shape.keys)).astype(dtype),
        "mask": rng.random((shape.queries, shape.keys)) < 0.7,
        "sinks": rng.standard_normal(shape.heads).astype(dtype),
    }  # fmt: skip


def _coins(q_positions, k_positions):
    return (q_positions * 7 + k_positions * 3) % 5 != 0


def _of_heads(q_positions, k_positions):
    # The first head sees even distances, the second odd ones, and so on.
    xp = array_api_compat.array_namespace(q_positions)
    heads = xp.arange(4, dtype=xp.int64, device=array_api_compat.device(q_positions))[:, None, None]
    return (q_positions - k_positions + heads) % 2 == 0


class PrefixLm:
    """The first keys are seen by all queries, the others causally."""

    def __init__(self, length):
        self.length = length

    def __call__(self, q_positions, k_positions):
        return (k_positions <= q_positions) | (k_positions < self.length)

    def interval(self, q_range, k_range):
        """True where all pairs are seen, False where none is."""
        if max(k_range) < self.length or max(k_range) <= min(q_range):
            return True
        return False if min(k_range) >= self.length and min(k_range) > max(q_range) else None


def _mask_of_positions(rng, shape, dtype):
    return {"mask": _coins if shape.heads < 4 else _of_heads, "window": (9, 5)}


def _prefix_lm(rng, shape, dtype):
    return {"mask": PrefixLm(shape.keys // 3), "query_offset": shape.keys - shape.queries}


def _slopes(shape, dtype):
    return np.array([2.0 ** -(n + 1) for n in range(shape.heads)]).astype(dtype)


def _alibi(rng, shape, dtype):
    offsets = [3 * entry for entry in range(shape.batch)]
    return {"alibi": _slopes(shape, dtype), "causal": True, "query_offset": offsets}


def _alibi_and_more(rng, shape, dtype):
    return {
        "alibi": -_slopes(shape, dtype), "prefix": _prefix_of(rng, shape, dtype, 4), "softcap": 3.0, "mask": _coins,
        "bias": rng.standard_normal((shape.heads, 1, shape.keys)).astype(dtype),
    }  # fmt: skip


def _dropout(rng, shape, dtype):
    offsets = [2 * entry + 1 for entry in range(shape.batch)]
    return {"dropout": 0.3, "dropout_seed": 2**63 + 12345, "causal": True, "query_offset": offsets}


def _dropout_and_more(rng, shape, dtype):
    return {
        "dropout": 0.5, "dropout_seed": 7, "prefix": _prefix_of(rng, shape, dtype, 5), "window": (6, 3),
        "sinks": rng.standard_normal(shape.heads).astype(dtype),
        "bias": rng.standard_normal((shape.queries, shape.keys)).astype(dtype),
    }  # fmt: skip


def _decoded(rng, shape, dtype, whole):
    """The queries are the last positions; ``whole``: every rank has all of them. Gradients are of ring attention."""
    return {
        "decoded": "whole" if whole else "dealt", "causal": True, "window": (17, 0), "softcap": 3.0,
        "key_lengths": [shape.keys] * shape.batch, "query_offset": shape.keys - shape.queries,
        "sinks": rng.standard_normal(shape.heads).astype(dtype),
    }  # fmt: skip


def _everything(rng, shape, dtype):
    return {
        "causal": True,
        "window": (9, 4),
        "scale": 0.7,
        "softcap": 2.5,
        "bias": rng.standard_normal((shape.heads, 1, shape.keys)).astype(dtype),
        "mask": rng.random((shape.queries, shape.keys)) < 0.8,
        "query_offset": [3 * entry + 1 for entry in range(shape.batch)],
        "key_lengths": [shape.keys - entry - 1 for entry in range(shape.batch)],
        "sinks": rng.standard_normal(shape.heads).astype(dtype),
        "prefix": _prefix_of(rng, shape, dtype, 2),
        "alibi": _slopes(shape, dtype),
        "dropout": 0.1,
        "dropout_seed": 1,
    }


FEATURES: dict[str, Feature] = {
    "plain": lambda rng, shape, dtype: {},
    "causal": lambda rng, shape, dtype: {"causal": True},
    "window": lambda rng, shape, dtype: {"window": (5, 2)},
    "window left": lambda rng, shape, dtype: {"window": (4, None)},
    "window right": lambda rng, shape, dtype: {"window": (None, 0)},
    "window itself": lambda rng, shape, dtype: {"window": (0, 0)},
    "causal window": lambda rng, shape, dtype: {"causal": True, "window": 7},
    "scale": lambda rng, shape, dtype: {"scale": 1.3},
    "softcap": lambda rng, shape, dtype: {"softcap": 1.5, "causal": True},
    "bias": _bias,
    "hiding bias": _hiding_bias,
    "finfo bias": _finfo_bias,
    "row bias": lambda rng, shape, dtype: {"bias": rng.standard_normal((shape.batch, 1, 1, shape.keys)).astype(dtype)},
    "column bias": lambda rng, shape, dtype: {
        "bias": rng.standard_normal((1, shape.heads, shape.queries, 1)).astype(dtype)
    },
    "mask": _mask,
    "key mask": lambda rng, shape, dtype: {"mask": rng.random((shape.batch, 1, 1, shape.keys)) < 0.7, "causal": True},
    "offset": lambda rng, shape, dtype: {"causal": True, "query_offset": shape.keys // 3},
    "negative offset": lambda rng, shape, dtype: {"causal": True, "query_offset": -2},
    "offsets": lambda rng, shape, dtype: {"causal": True, "query_offset": [7 - 5 * b for b in range(shape.batch)]},
    "key lengths": lambda rng, shape, dtype: {
        "key_lengths": [max(0, shape.keys - 6 * b - 2) for b in range(shape.batch)]
    },
    "no keys": lambda rng, shape, dtype: {"key_lengths": [0] * shape.batch},
    "large logits": lambda rng, shape, dtype: {"scale": 2000.0, "causal": True},
    "documents": _documents,
    "documents of entries": _documents_of_entries,
    "cu_seqlens": _cu_seqlens,
    "sinks": _sinks,
    "sinks alone": _sinks_alone,
    "prefix": _prefix,
    "prefix reduced": _prefix_reduced,
    "mask of positions": _mask_of_positions,
    "prefix LM": _prefix_lm,
    "ALiBi": _alibi,
    "ALiBi and more": _alibi_and_more,
    "dropout": _dropout,
    "dropout and more": _dropout_and_more,
    "everything": _everything,
    "double ring": lambda rng, shape, dtype: {"schedule": "double", "causal": True},
    "double ring, window": lambda rng, shape, dtype: {"schedule": "double", "window": (17, 3), "softcap": 2.0},
    "both ways": lambda rng, shape, dtype: {"schedule": "bidirectional", "causal": True},
    "both ways, all seen": lambda rng, shape, dtype: {
        "schedule": "bidirectional", "key_lengths": [shape.keys - entry for entry in range(shape.batch)],
    },
    "resumed": lambda rng, shape, dtype: {"resumed": shape.keys, "causal": True, "softcap": 2.0},
    "decoded": lambda rng, shape, dtype: _decoded(rng, shape, dtype, whole=True),
    "decoded, dealt": lambda rng, shape, dtype: _decoded(rng, shape, dtype, whole=False),
    "dilated": lambda rng, shape, dtype: {
        "segment_lengths": [7, 12, 64], "dilation_rates": [1, 2, 4], "causal": True, "softcap": 3.0,
    },
    "dilated, dropout": lambda rng, shape, dtype: {
        "segment_lengths": [7, 12], "dilation_rates": [1, 2], "dropout": 0.3, "dropout_seed": 3, "causal": True,
    },
    "dilated by block": lambda rng, shape, dtype: {
        "segment_lengths": [16, 9], "dilation_rates": [2, 3], "head_offset": "block", "scale": 0.4,
        "key_lengths": [shape.keys - entry for entry in range(shape.batch)], "dropout": 0.2, "dropout_seed": 9,
    },
}  # fmt: skip

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
    """Seeded inputs [B, H, S, D] and keywords of a case; numbers do not depend on layout or ring size."""
    shape = SHAPES_OF_ALL[case.shape]
    rng = np.random.default_rng([len(case.shape), len(case.feature), sum(map(ord, case.feature))])
    sizes = {
        "q": (shape.batch, shape.heads, shape.queries, shape.width),
        "k": (shape.batch, shape.key_heads, shape.keys, shape.width),
        "v": (shape.batch, shape.key_heads, shape.keys, shape.value_width),
        "dout": (shape.batch, shape.heads, shape.queries, shape.value_width),
        "dlse": (shape.batch, shape.heads, shape.queries),
    }
    arrays = {name: rng.standard_normal(size).astype(case.dtype) for name, size in sizes.items()}
    if case.dtype in HALF_DTYPES:
        arrays["dlse"] = arrays["dlse"].astype("float32")  # as lse is
    return arrays, FEATURES[case.feature](rng, shape, case.dtype)
