"""The table of what attention is asked: every keyword, alone and beside others, for inputs of any shape and dtype.

One table for all: ringcore's own tests ask it of every backend, and audits ask those rows that an implementation takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np

Keywords = dict[str, Any]
Array = np.ndarray[Any, Any]
Rng = np.random.Generator


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


Feature = Callable[[Rng, Shape, str], Keywords]


def draw(name: str, rng: Rng, shape: Shape, dtype: str) -> tuple[dict[str, Array], Keywords]:
    """Inputs of a row: q, k, v, dout [B, H, S, D] and dlse [B, H, S] (float32 beside half types), and its keywords."""
    sizes = {
        "q": (shape.batch, shape.heads, shape.queries, shape.width),
        "k": (shape.batch, shape.key_heads, shape.keys, shape.width),
        "v": (shape.batch, shape.key_heads, shape.keys, shape.value_width),
        "dout": (shape.batch, shape.heads, shape.queries, shape.value_width),
        "dlse": (shape.batch, shape.heads, shape.queries),
    }
    arrays: dict[str, Array] = {each: rng.standard_normal(size).astype(dtype) for each, size in sizes.items()}
    if dtype in ("float16", "bfloat16"):
        arrays["dlse"] = arrays["dlse"].astype("float32")  # as lse is
    return arrays, FEATURES[name](rng, shape, dtype)


def _bias(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    return {"bias": rng.standard_normal((shape.batch, shape.heads, shape.queries, shape.keys)).astype(dtype)}


def _hiding_bias(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    bias = rng.standard_normal((shape.queries, shape.keys))
    bias[rng.random(bias.shape) < 0.3] = -np.inf
    bias[shape.queries // 2] = -np.inf
    return {"bias": bias.astype(dtype)}


def _finfo_bias(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    # The mask of many model libraries: the most negative number, and whole rows of nothing else.
    smallest = float(ml_dtypes.finfo(dtype).min)
    bias = np.where(rng.random((shape.batch, 1, shape.queries, shape.keys)) < 0.4, smallest, 0.0)
    bias[:, :, shape.queries // 2] = smallest
    return {"bias": bias.astype(dtype), "causal": True}


def _mask(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    mask = rng.random((shape.batch, shape.heads, shape.queries, shape.keys)) < 0.6
    mask[:, :, 0] = False
    return {"mask": mask}


def _mask_for_all(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    mask = rng.random((shape.queries, shape.keys)) < 0.6
    mask[shape.queries // 5] = False
    return {"mask": mask}


def _documents(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    cuts = sorted(rng.integers(0, shape.keys, 3))
    return {"documents": np.searchsorted(cuts, np.arange(shape.keys), side="right"), "causal": True}


def _documents_of_entries(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    # Runs of any ids, which come back: equal ones are one document.
    runs = rng.integers(0, 3, (shape.batch, shape.keys // 4 + 1))
    return {"documents": np.repeat(runs, 4, axis=1)[:, : shape.keys]}


def _cu_seqlens(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    cuts = [0, shape.keys // 4, shape.keys // 4 + 1, shape.keys]
    offset = shape.keys - shape.queries
    return {"cu_seqlens": sorted(set(cuts)), "window": (6, 2), "query_offset": offset // 2}


def _sinks(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    sinks = 2 * rng.standard_normal(shape.heads)
    sinks[0] = 4.0  # larger than most scores
    return {"sinks": sinks.astype(dtype), "causal": True}


def _sinks_alone(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    # Rows that see no key, and a head without a sink.
    sinks = np.append(rng.standard_normal(shape.heads - 1), -np.inf)
    lengths = [max(0, shape.keys - 20 * entry - 20) for entry in range(shape.batch)]
    return {"sinks": sinks.astype(dtype), "window": (8, 3), "key_lengths": lengths}


def _prefix_of(rng: Rng, shape: Shape, dtype: str, length: int) -> tuple[Array, ...]:
    heads = shape.batch, shape.key_heads, length
    return tuple(rng.standard_normal((*heads, width)).astype(dtype) for width in (shape.width, shape.value_width))


def _prefix(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    # Every query sees it, those too that see nothing else.
    return {"prefix": _prefix_of(rng, shape, dtype, 7), "window": (4, 0), "query_offset": shape.keys - 2}


def _prefix_reduced(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    return {
        "prefix": _prefix_of(rng, shape, dtype, 3), "causal": True, "softcap": 2.0, "reduce_replicated": True,
        "bias": rng.standard_normal((1, shape.heads, 1, shape.keys)).astype(dtype),
        "mask": rng.random((shape.queries, shape.keys)) < 0.7,
        "sinks": rng.standard_normal(shape.heads).astype(dtype),
    }  # fmt: skip


def _coins(q_positions: Any, k_positions: Any) -> Any:
    return (q_positions * 7 + k_positions * 3) % 5 != 0


def _of_heads(q_positions: Any, k_positions: Any) -> Any:
    # The first head sees even distances, the second odd ones, and so on.
    xp = array_api_compat.array_namespace(q_positions)
    heads = xp.arange(4, dtype=xp.int64, device=array_api_compat.device(q_positions))[:, None, None]
    return (q_positions - k_positions + heads) % 2 == 0


class PrefixLm:
    """A mask of positions: the first keys are seen by all queries, the others causally."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, q_positions: Any, k_positions: Any) -> Any:
        """True where a query sees a key."""
        return (k_positions <= q_positions) | (k_positions < self.length)

    def interval(self, q_range: range, k_range: range) -> bool | None:
        """True where all pairs are seen, False where none is."""
        if max(k_range) < self.length or max(k_range) <= min(q_range):
            return True
        return False if min(k_range) >= self.length and min(k_range) > max(q_range) else None


def _mask_of_positions(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    return {"mask": _coins if shape.heads < 4 else _of_heads, "window": (9, 5)}


def _prefix_lm(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    return {"mask": PrefixLm(shape.keys // 3), "query_offset": shape.keys - shape.queries}


def _slopes(shape: Shape, dtype: str) -> Array:
    return np.array([2.0 ** -(n + 1) for n in range(shape.heads)]).astype(dtype)


def _alibi(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    offsets = [3 * entry for entry in range(shape.batch)]
    return {"alibi": _slopes(shape, dtype), "causal": True, "query_offset": offsets}


def _alibi_and_more(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    return {
        "alibi": -_slopes(shape, dtype), "prefix": _prefix_of(rng, shape, dtype, 4), "softcap": 3.0, "mask": _coins,
        "bias": rng.standard_normal((shape.heads, 1, shape.keys)).astype(dtype),
    }  # fmt: skip


def _dropout(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    offsets = [2 * entry + 1 for entry in range(shape.batch)]
    return {"dropout": 0.3, "dropout_seed": 2**63 + 12345, "causal": True, "query_offset": offsets}


def _dropout_and_more(rng: Rng, shape: Shape, dtype: str) -> Keywords:
    return {
        "dropout": 0.5, "dropout_seed": 7, "prefix": _prefix_of(rng, shape, dtype, 5), "window": (6, 3),
        "sinks": rng.standard_normal(shape.heads).astype(dtype),
        "bias": rng.standard_normal((shape.queries, shape.keys)).astype(dtype),
    }  # fmt: skip


def _decoded(rng: Rng, shape: Shape, dtype: str, whole: bool) -> Keywords:
    """The queries are the last positions; ``whole``: every rank has all of them. Gradients are of ring attention."""
    return {
        "decoded": "whole" if whole else "dealt", "causal": True, "window": (17, 0), "softcap": 3.0,
        "key_lengths": [shape.keys] * shape.batch, "query_offset": shape.keys - shape.queries,
        "sinks": rng.standard_normal(shape.heads).astype(dtype),
    }  # fmt: skip


def _everything(rng: Rng, shape: Shape, dtype: str) -> Keywords:
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
    "mask for all": _mask_for_all,
    "prefix, causal": lambda rng, shape, dtype: {"prefix": _prefix_of(rng, shape, dtype, 5), "causal": True},
    "dilated, two branches": lambda rng, shape, dtype: {
        "segment_lengths": [max(1, shape.keys // 4), max(1, shape.keys // 2)], "dilation_rates": [1, 2],
    },
}  # fmt: skip
