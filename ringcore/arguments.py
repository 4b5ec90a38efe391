"""What a call was given, checked and put into the one form that the rest of ringcore reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ringcore.dilation import Dilation, check_dilation
from ringcore.documents import Documents, read_documents
from ringcore.errors import KeywordError, ShapeError
from ringcore.inputs import Inputs, check_inputs, check_slopes, check_term, put_in_order, swap_axes
from ringcore.keywords import (
    check_documents,
    check_dropout,
    check_flag,
    check_key_lengths,
    check_offsets,
    check_scale,
    check_softcap,
    check_window,
)
from ringcore.layout import AUTO, Layout, check_layout_name
from ringcore.partial import dtype_name
from ringcore.positions import Mask, shown
from ringcore.routes import RING, Schedule, check_schedule
from ringcore.values import Array, Score, Tile

AXES = ("bhsd", "bshd")
_FARTHEST = 1 << 62  # so that distances to it are int64 too


@dataclass(frozen=True)
class Arguments:
    """One rank's arguments: arrays as [B, H, S, D], bias and mask with four axes, keywords in full.

    bias_shape is as it came. sinks and alibi [H]; prefix_k and prefix_v [B, Hk, P, ...]. offsets has one entry per
    batch entry; key_lengths too, or is None for "all keys". mask_of is a mask as a function of positions, dilation what
    `ringcore.dilated_attention` was told.
    """

    q: Array
    k: Array
    v: Array
    bias: Array | None
    bias_shape: tuple[int, ...]
    mask: Array | None
    sinks: Array | None
    prefix_k: Array | None
    prefix_v: Array | None
    alibi: Array | None
    score: Score
    causal: bool
    window: tuple[int | None, int | None]
    offsets: tuple[int, ...]
    key_lengths: tuple[int, ...] | None
    documents: Documents | None
    q_layout: str | Layout
    k_layout: str | Layout
    axes: str
    reduce_replicated: bool
    mask_of: Mask | None
    dilation: Dilation | None
    schedule: Schedule

    @property
    def dtype(self) -> str:
        """The name of the dtype of q, k and v."""
        return dtype_name(self.q)

    @property
    def needs(self) -> frozenset[str]:
        """What kernels must be able to do for the forward pass, as `Capabilities` names it."""
        terms = {
            "bias": (self.bias, self.alibi), "mask": (self.mask, self.mask_of), "softcap": (self.score.softcap,),
            "window": (self.window[0],), "dropout": (self.score.dropout or None,),
        }  # fmt: skip
        return frozenset(name for name, given in terms.items() if any(x is not None for x in given))

    def about(self, inputs: Inputs, **changed: Any) -> Arguments:
        """The same keywords, but those ``changed``, about other arrays as they came.

        They were checked, or are like those that were.
        """
        return replace(self, **put_in_order(inputs, self.axes)._asdict(), **changed)

    def without_arrays(self) -> Arguments:
        """The keywords alone, which keep no array in memory."""
        nothing: dict[str, Any] = dict.fromkeys(Inputs._fields)
        return replace(self, **nothing)


def check_arguments(
    inputs: Inputs, *, causal: bool, window: Any, scale: float | None, softcap: float | None,
    dropout: float = 0.0, dropout_seed: int | None = None, query_offset: Any,
    key_lengths: Any, documents: Any = None, cu_seqlens: Any = None, layout: str | Layout,
    q_layout: str | Layout | None = None, k_layout: str | Layout | None = None, axes: str,
    reduce_replicated: bool = False, mask_of: Mask | None = None, dilation: Any = None,
    schedule: Schedule = RING,
) -> Arguments:  # fmt: skip
    """The arguments in full, or the first error among them. Lengths across ranks are checked later."""
    if not isinstance(axes, str) or axes not in AXES:
        raise KeywordError(f'axes is {axes!r}; it must be "bhsd" (batch, heads, sequence, width) or "bshd".')
    if (inputs.prefix_k is None) != (inputs.prefix_v is None):
        raise KeywordError("prefix must hold two arrays, (k, v): keys and values that every rank has.")
    check_inputs(inputs, axes)
    for name, given in (("layout", layout), ("q_layout", q_layout), ("k_layout", k_layout)):
        if given == AUTO and name == "layout" and q_layout is None and k_layout is None:
            continue
        if given is not None or name == "layout":
            check_layout_name(given, name)
    check_schedule(schedule)
    check_flag("causal", causal)
    check_flag("reduce_replicated", reduce_replicated)
    bias, sinks, q = inputs.bias, inputs.sinks, swap_axes(inputs.q, axes)
    check_term("bias", bias, q)
    check_term("mask", inputs.mask, q)
    for name, x, what in (("sinks", sinks, "score"), ("alibi", inputs.alibi, "slope")):
        if x is not None and tuple(x.shape) != (q.shape[1],):
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; it must hold one {what} for each of q's {q.shape[1]} heads, [H]."
            )
    check_slopes(inputs.alibi)
    batch = q.shape[0]
    offsets = check_offsets(query_offset, batch)
    read = {"alibi": inputs.alibi is not None, "dropout": bool(dropout), "mask, a function,": mask_of is not None}
    for name in (name for name, given in read.items() if given and max(map(abs, offsets), default=0) > _FARTHEST):
        raise KeywordError(
            f"query_offset is {list(offsets)}, but {name} reads positions as integers of 64 bits. Give offsets of "
            "62 bits at most."
        )
    if mask_of is not None:
        _try_mask(mask_of, q, swap_axes(inputs.k, axes), offsets)
    return Arguments(
        **put_in_order(inputs, axes)._asdict(),
        bias_shape=() if bias is None else tuple(bias.shape),
        score=Score(check_scale(scale, q), check_softcap(softcap, q), *check_dropout(dropout, dropout_seed, q)),
        causal=bool(causal),
        window=check_window(window, bool(causal)),
        offsets=offsets,
        key_lengths=None if key_lengths is None else check_key_lengths(key_lengths, batch),
        documents=check_documents(read_documents(documents, cu_seqlens), batch),
        q_layout=layout if q_layout is None else q_layout,
        k_layout=layout if k_layout is None else k_layout,
        axes=axes,
        reduce_replicated=bool(reduce_replicated),
        mask_of=mask_of,
        dilation=None if dilation is None else check_dilation(*dilation),
        schedule=schedule,
    )  # fmt: skip


def _try_mask(mask: Mask, q: Array, k: Array, offsets: tuple[int, ...]) -> None:
    """Raise what the first positions show to be wrong with a mask's answers, before anything is sent."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    rows, columns = range(offsets[0], offsets[0] + min(queries, 2)) if offsets else range(0), range(min(keys, 3))
    if rows and columns:
        whole, some, other = (slice(0, n) for n in (batch, len(rows), len(columns)))
        tile = Tile(whole, slice(0, heads), slice(0, k.shape[1]), some, other, (rows,), (columns,))
        shown(mask, tile, q, batch, heads)


def check_columns(arguments: Arguments, queries: int, keys: int) -> None:
    """Raise unless bias, mask, key_lengths and documents fit the global numbers of queries and keys."""
    for name, term in (("bias", arguments.bias), ("mask", arguments.mask)):
        if term is not None and term.shape[3] not in (1, keys):
            raise ShapeError(
                f"{name} has {term.shape[3]} columns, but there are {keys} keys over all ranks. "
                "It must hold 1 column or all of them, in global order."
            )
    if arguments.dilation is not None and queries != keys:
        raise ShapeError(
            f"q has {queries} rows over all ranks, and k has {keys}: dilated attention is of one sequence with itself, "
            "whose segments hold queries and keys of the same positions."
        )
    for entry, length in enumerate(arguments.key_lengths or ()):
        if length > keys:
            raise KeywordError(f"key_lengths is {length} for batch entry {entry}, but there are only {keys} keys.")
    if arguments.documents is None:
        return
    if (length := arguments.documents.length) != keys:
        raise KeywordError(
            f"the documents end at position {length}, but there are {keys} keys over all ranks. Give every rank the "
            "documents of the whole sequence."
        )
    for entry, offset in enumerate(arguments.offsets):
        if queries and not 0 <= offset <= keys - queries:
            raise KeywordError(
                f"the queries of batch entry {entry} are at the positions {offset} to {offset + queries - 1}, but "
                f"documents are known for 0 to {keys - 1}: none can be told for the others. Change query_offset."
            )
