"""What a call was given, checked and put into the one form that the rest of ringcore reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import array_api_compat

from ringcore.dilation import Dilation, check_dilation
from ringcore.documents import Documents, read_documents
from ringcore.errors import DeviceError, DtypeError, KeywordError, ShapeError, UnsupportedError
from ringcore.integers import integers_of_entries, is_integer
from ringcore.layout import AUTO, Layout, check_layout_name
from ringcore.partial import FLOATING, accumulation_dtype, dtype_name
from ringcore.positions import Mask, shown
from ringcore.routes import RING, Schedule, check_schedule
from ringcore.values import Array, Score, Tile, namespace

AXES = ("bhsd", "bshd")


class Inputs(NamedTuple):
    """The arrays of a call, as they came; None for those that did not."""

    q: Array
    k: Array
    v: Array
    bias: Array | None = None
    mask: Array | None = None
    sinks: Array | None = None
    prefix_k: Array | None = None
    prefix_v: Array | None = None
    alibi: Array | None = None

    @classmethod
    def of(
        cls, q: Array, k: Array, v: Array, bias: Any = None, mask: Any = None, sinks: Any = None, prefix: Any = None,
        alibi: Any = None,
    ) -> Inputs:  # fmt: skip
        """The arrays with those of ``prefix``; what is no pair is left for the checks, where the other ranks hear."""
        mask = None if callable(mask) else mask  # a function of positions is a keyword
        prefix_k, prefix_v = prefix if isinstance(prefix, Sequence) and len(prefix) == 2 else (prefix, None)
        return cls(q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi)


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
        return replace(self, **_put_in_order(inputs, self.axes)._asdict(), **changed)

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
    _check_arrays(inputs)
    _check_shapes(inputs, axes)
    _check_prefix(inputs, axes)
    for name, given in (("layout", layout), ("q_layout", q_layout), ("k_layout", k_layout)):
        if given == AUTO and name == "layout" and q_layout is None and k_layout is None:
            continue
        if given is not None or name == "layout":
            check_layout_name(given, name)
    check_schedule(schedule)
    check_flag("causal", causal)
    check_flag("reduce_replicated", reduce_replicated)
    bias, sinks, q = inputs.bias, inputs.sinks, swap_axes(inputs.q, axes)
    _check_term("bias", bias, q)
    _check_term("mask", inputs.mask, q)
    for name, x, what in (("sinks", sinks, "score"), ("alibi", inputs.alibi, "slope")):
        if x is not None and tuple(x.shape) != (q.shape[1],):
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; it must hold one {what} for each of q's {q.shape[1]} heads, [H]."
            )
    if getattr(inputs.alibi, "requires_grad", False) is True:
        raise UnsupportedError("alibi requires grad, but no gradient of its slopes is made. Give it detached.")
    batch = q.shape[0]
    offsets = check_offsets(query_offset, batch)
    if mask_of is not None:
        _try_mask(mask_of, q, swap_axes(inputs.k, axes), offsets)
    return Arguments(
        **_put_in_order(inputs, axes)._asdict(),
        bias_shape=() if bias is None else tuple(bias.shape),
        score=Score(_scale(scale, q), _softcap(softcap, q), *_dropout(dropout, dropout_seed, q)),
        causal=bool(causal),
        window=check_window(window, bool(causal)),
        offsets=offsets,
        key_lengths=None if key_lengths is None else check_key_lengths(key_lengths, batch),
        documents=_checked_documents(read_documents(documents, cu_seqlens), batch),
        q_layout=layout if q_layout is None else q_layout,
        k_layout=layout if k_layout is None else k_layout,
        axes=axes,
        reduce_replicated=bool(reduce_replicated),
        mask_of=mask_of,
        dilation=check_dilation(dilation),
        schedule=schedule,
    )  # fmt: skip


def _put_in_order(inputs: Inputs, axes: str) -> Inputs:
    """q, k, v and the prefix as [B, H, S, D], bias and mask with four axes."""
    q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi = inputs
    if prefix_k is not None and prefix_v is not None:
        prefix_k, prefix_v = swap_axes(prefix_k, axes), swap_axes(prefix_v, axes)
    bias, mask = (x if x is None else _in_four_axes(x) for x in (bias, mask))
    q, k, v = swap_axes(q, axes), swap_axes(k, axes), swap_axes(v, axes)
    return Inputs(q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi)


def swap_axes(x: Array, axes: str) -> Array:
    """[B, S, H, D] as [B, H, S, D] and back, if ``axes`` says so; a view where the library has views."""
    return x if axes == "bhsd" else namespace(x).permute_dims(x, (0, 2, 1, 3))


def check_window(window: Any, causal: bool) -> tuple[int | None, int | None]:
    """``window`` as (left, right); an int w counts the positions that a causal query sees, itself included."""
    if window is None:
        return None, None
    if is_integer(window):
        if not causal:
            raise KeywordError(
                f"window is the single number {window}, which is defined for causal=True only. "
                "Give (left, right) for a window on both sides."
            )
        if window < 1:
            raise KeywordError(f"window is {window}, but a query sees at least itself: give 1 or more.")
        return int(window) - 1, 0
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise KeywordError(f"window is {window!r}; it must be (left, right), None, or with causal=True a number.")
    for side in window:
        if side is not None and (not is_integer(side) or side < 0):
            raise KeywordError(
                f"window is {window!r}; each side must be None (unbounded) or an integer from 0 (itself only) on."
            )
    left, right = (None if side is None else int(side) for side in window)
    return left, right


def library_name(x: Array) -> str:
    """The bare name of the library of x: "numpy", "torch", "cupy", ..."""
    name: str = namespace(x).__name__
    return name.removeprefix("array_api_compat.").partition(".")[0]


def conversion(due: str, came: str) -> str:
    """How arrays of the library ``came`` become those of ``due``."""
    if {due, came} == {"cupy", "torch"}:
        detached = "x.detach()" if came == "torch" else "x"
        return (
            f"On one GPU {due}.from_dlpack({detached}) gives an array of {came} to {due} without a copy, and "
            f"{came}.from_dlpack gives results back; Torch's autograd does not see through. Nothing is converted "
            "unasked."
        )
    return f"Convert them to one first, for example with {due}'s from_dlpack."


def check_flag(name: str, value: Any) -> None:
    """Raise KeywordError unless ``value`` is True or False, also as NumPy's scalar."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise KeywordError(f"{name} is {value!r}; it must be True or False.")


def check_array(name: str, x: Any) -> None:
    """Raise unless x is an array all of which attention can honour."""
    if not array_api_compat.is_array_api_obj(x):
        raise DtypeError(f"{name} is a {type(x).__name__}; it must be an array of NumPy, CuPy, Torch, JAX or the like.")
    if type(x).__name__ == "MaskedArray":
        raise UnsupportedError(
            f"{name} is a masked array, whose mask attention would not see. Give {name}.data, and say with mask= "
            "which keys a query may attend."
        )
    if array_api_compat.is_torch_array(x) and str(x.layout) != "torch.strided":
        raise UnsupportedError(f"{name} is a tensor of layout {x.layout}; attention is defined for dense ones.")


def check_detached(**arrays: Any) -> None:
    """Raise UnsupportedError for a tensor whose gradients Torch would have to record."""
    for name, x in arrays.items():
        if getattr(x, "requires_grad", False) is True:
            raise UnsupportedError(
                f"{name} requires grad, but Torch's autograd does not see through a pullback. Call "
                "ringcore.ring_attention, which it does see through, or give detached tensors."
            )


def _check_arrays(inputs: Inputs) -> None:
    given = {name: x for name, x in inputs._asdict().items() if x is not None or name in ("q", "k", "v")}
    libraries = {}
    for name, x in given.items():
        check_array(name, x)
        libraries[name] = library_name(x)
    if len(set(libraries.values())) > 1:
        other = next(name for name in libraries.values() if name != libraries["q"])
        raise DeviceError(
            f"the arrays belong to different libraries ({_listed(libraries)}). {conversion(libraries['q'], other)}"
        )
    places = {name: array_api_compat.device(x) for name, x in given.items()}
    devices = {name: str(place) for name, place in places.items() if place is not None}  # JAX traces without one
    if len(set(devices.values())) > 1:
        raise DeviceError(f"the arrays are on different devices ({_listed(devices)}). Move them to one first.")
    terms = "bias", "mask", "sinks", "alibi"
    dtypes = {name: dtype_name(x) for name, x in given.items() if name not in terms}
    for name, dtype in dtypes.items():
        if dtype not in FLOATING:
            raise DtypeError(f"{name} holds {dtype}; attention is defined for {', '.join(FLOATING)}. Convert it first.")
    if len(set(dtypes.values())) > 1:
        raise DtypeError(f"{', '.join(dtypes)} must share one dtype, but hold {_listed(dtypes)}.")
    if "mask" in given and dtype_name(mask := given["mask"]) != "bool":
        raise DtypeError(
            f"mask holds {dtype_name(mask)}; it must be bool, True = may attend. For added scores use bias."
        )
    floating = ("bias", "added to the scores"), ("sinks", "a score for each head"), ("alibi", "a slope for each head")
    for name, what in floating:
        if name in given and dtype_name(given[name]) not in FLOATING:
            raise DtypeError(
                f"{name} holds {dtype_name(given[name])}; it is {what} and must be one of {', '.join(FLOATING)}."
            )


def _check_shapes(inputs: Inputs, axes: str) -> None:
    """Raise ShapeError unless the shapes of q, k and v fit each other."""
    letters = "[B, H, S, D]" if axes == "bhsd" else "[B, S, H, D]"
    for name in ("q", "k", "v", "prefix_k", "prefix_v"):
        x = getattr(inputs, name)
        if x is not None and x.ndim != 4:
            raise ShapeError(f"{name} has {x.ndim} axes, shape {tuple(x.shape)}; it must have four, {letters}.")
    q, k, v = (swap_axes(x, axes) for x in inputs[:3])
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} as [B, H, S, D]"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ShapeError(f"q, k and v must share the batch size, but came as {shapes}.")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise ShapeError(f"k and v must share heads and length, but came as {shapes}.")
    if q.shape[3] != k.shape[3]:
        raise ShapeError(f"q and k must share the width D, but came as {shapes}.")
    if min(q.shape[3], v.shape[3], q.shape[1], k.shape[1]) < 1:
        raise ShapeError(f"widths and heads must be at least 1, but came as {shapes}.")
    if q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"q has {q.shape[1]} heads, which the {k.shape[1]} heads of k and v do not divide. "
            "Grouped heads need a whole number of query heads for each key head."
        )


def _check_prefix(inputs: Inputs, axes: str) -> None:
    if inputs.prefix_k is None:
        return
    k, v, prefix_k, prefix_v = (swap_axes(x, axes) for x in (inputs.k, inputs.v, inputs.prefix_k, inputs.prefix_v))
    length = prefix_k.shape[2]
    for name, x, like in (("k", prefix_k, k), ("v", prefix_v, v)):
        due = *like.shape[:2], length, like.shape[3]
        if tuple(x.shape) != due:
            raise ShapeError(
                f"the {name} of prefix has shape {tuple(x.shape)} as [B, H, P, D]; beside {name} {tuple(like.shape)} "
                f"and a prefix of {length} keys it must be {due}."
            )


def _try_mask(mask: Mask, q: Array, k: Array, offsets: tuple[int, ...]) -> None:
    """Raise what the first positions show to be wrong with a mask's answers, before anything is sent."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    rows, columns = range(offsets[0], offsets[0] + min(queries, 2)) if offsets else range(0), range(min(keys, 3))
    if rows and columns:
        whole, some, other = (slice(0, n) for n in (batch, len(rows), len(columns)))
        tile = Tile(whole, slice(0, heads), slice(0, k.shape[1]), some, other, (rows,), (columns,))
        shown(mask, tile, q, batch, heads)


def _check_term(name: str, term: Array | None, q: Array) -> None:
    if term is None:
        return
    came = tuple(term.shape)
    if not 2 <= term.ndim <= 4:
        raise ShapeError(
            f"{name} has {term.ndim} axes, shape {came}; it must have two to four, the last ones of [B, H, S, N]. "
            "What is one for all rows has 1 in the place of S."
        )
    term = _in_four_axes(term)
    for axis, letter in enumerate("BHS"):
        if term.shape[axis] not in (1, q.shape[axis]):
            raise ShapeError(
                f"{name} has shape {came}; its axis {letter} must be 1 or q's {q.shape[axis]} to fit [B, H, S, N]. "
                "With ring= it holds this rank's rows and all columns in global order."
            )


def _in_four_axes(term: Array) -> Array:
    """The bias or mask with leading axes of 1."""
    if term.ndim == 4:
        return term
    return namespace(term).reshape(term, (1,) * (4 - term.ndim) + tuple(term.shape))


def within_range(bias: Array | None, q: Array) -> Array | None:
    """A bias, or sinks, with finite numbers in the range of the scores: one that rounded to -inf would hide its key."""
    if bias is None or dtype_name(bias) != "float64" or dtype_name(q) == "float64":
        return bias
    xp = namespace(bias)
    largest = float(xp.finfo(accumulation_dtype(q)).max)
    return xp.where(xp.isfinite(bias), xp.clip(bias, -largest, largest), bias)


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


def _scale(scale: Any, q: Array) -> float:
    if scale is None:
        return float(1 / math.sqrt(q.shape[3]))
    return _number("scale", scale, q)


def _softcap(softcap: Any, q: Array) -> float | None:
    if softcap is None:
        return None
    value = _number("softcap", softcap, q)
    # A cap is divided by: one that rounds to 0 in the scores' dtype would give NaN.
    smallest = float(namespace(q).finfo(accumulation_dtype(q)).smallest_normal)
    if value < smallest:
        due = "larger than 0" if value <= 0 else f"at least {smallest:.2g} for {dtype_name(q)} arrays"
        raise KeywordError(f"softcap is {softcap!r}; it must be {due}, or None for no cap.")
    return value


def _dropout(rate: Any, seed: Any, q: Array) -> tuple[float, int]:
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= float(rate) < 1:
        raise KeywordError(f"dropout is {rate!r}; it must be a rate from 0 on, and less than 1.")
    if seed is None and float(rate) > 0:
        raise KeywordError(
            f"dropout is {rate}, but there is no dropout_seed. Give a whole number, the same on every rank and another "
            "for each call."
        )
    if seed is not None and (not is_integer(seed) or not 0 <= seed < 1 << 64):
        raise KeywordError(f"dropout_seed is {seed!r}; it must be a whole number of 64 bits, 0 or more.")
    xp = namespace(q)
    if float(rate) > 0 and xp.arange(1, dtype=xp.int64, device=array_api_compat.device(q)).dtype != xp.int64:
        raise UnsupportedError(
            "dropout is drawn with integers of 64 bits, but the library makes shorter ones of them. For JAX call "
            'jax.config.update("jax_enable_x64", True) first.'
        )
    return float(rate), 0 if seed is None or not rate else int(seed)


def _number(name: str, value: Any, q: Array) -> float:
    """A real number on the host that the scores' dtype can hold."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    dtype = str(getattr(value, "dtype", "")).rpartition(".")[2]
    if not real and not (getattr(value, "shape", None) == () and (is_integer(value) or dtype in FLOATING)):
        raise KeywordError(f"{name} is {value!r}; it must be a real number.")
    if getattr(value, "requires_grad", False) is True:
        raise UnsupportedError(f"{name} requires grad, but no gradient with respect to it is made. Give a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    xp, wide = namespace(q), "float64" if dtype_name(q) == "float64" else "float32"
    if not abs(number) <= float(xp.finfo(accumulation_dtype(q)).max):  # so that NaN fails, too
        raise KeywordError(f"{name} is {number}; it must be finite in {wide}, in which scores are kept.")
    return number


def _checked_documents(documents: Documents | None, batch: int) -> Documents | None:
    if documents is not None and len(documents.runs) not in (1, batch):
        raise KeywordError(
            f"documents has {len(documents.runs)} rows; it must be [N] for all {batch} batch entries, or one row for "
            "each of them."
        )
    return documents


def check_offsets(query_offset: Any, batch: int) -> tuple[int, ...]:
    """The position of q's first row for each batch entry; raises KeywordError."""
    return tuple(integers_of_entries("query_offset", query_offset, batch, one_for_all=True))


def check_key_lengths(key_lengths: Any, batch: int) -> tuple[int, ...]:
    """How many keys each batch entry has; raises KeywordError."""
    lengths = tuple(integers_of_entries("key_lengths", key_lengths, batch, one_for_all=False))
    if min(lengths, default=0) < 0:
        raise KeywordError(f"key_lengths is {list(lengths)}; a number of keys is 0 or more.")
    return lengths


def _listed(named: dict[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in named.items())
