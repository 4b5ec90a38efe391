"""The arrays of a call: what they must be, and the one form that the rest of ringcore reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import array_api_compat

from ringcore.errors import DeviceError, DtypeError, ShapeError, UnsupportedError
from ringcore.partial import FLOATING, accumulation_dtype, dtype_name
from ringcore.values import Array, namespace

PULLBACK = (
    "Torch's autograd does not see through a pullback. Call ringcore.ring_attention, which it does see through, or "
    "give detached tensors"
)


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


def put_in_order(inputs: Inputs, axes: str) -> Inputs:
    """q, k, v and the prefix as [B, H, S, D], bias and mask with four axes."""
    q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi = inputs
    if prefix_k is not None and prefix_v is not None:
        prefix_k, prefix_v = swap_axes(prefix_k, axes), swap_axes(prefix_v, axes)
    bias, mask = (x if x is None else in_four_axes(x) for x in (bias, mask))
    q, k, v = swap_axes(q, axes), swap_axes(k, axes), swap_axes(v, axes)
    return Inputs(q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi)


def swap_axes(x: Array, axes: str) -> Array:
    """[B, S, H, D] as [B, H, S, D] and back, if ``axes`` says so; a view where the library has views."""
    return x if axes == "bhsd" else namespace(x).permute_dims(x, (0, 2, 1, 3))


def within_range(bias: Array | None, q: Array) -> Array | None:
    """A bias, or sinks, with finite numbers in the range of the scores: one that rounded to -inf would hide its key."""
    if bias is None or dtype_name(bias) != "float64" or dtype_name(q) == "float64":
        return bias
    xp = namespace(bias)
    largest = float(xp.finfo(accumulation_dtype(q)).max)
    return xp.where(xp.isfinite(bias), xp.clip(bias, -largest, largest), bias)


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


def check_detached(why: str, **arrays: Any) -> None:
    """Raise UnsupportedError for a tensor whose gradients Torch would have to record; ``why`` it can't be."""
    for name, x in arrays.items():
        if getattr(x, "requires_grad", False) is True and namespace(x).is_grad_enabled():
            raise UnsupportedError(f"{name} requires grad, but {why}.")


def check_slopes(alibi: Array | None) -> None:
    """Raise UnsupportedError for slopes that require grad, also where gradients of other inputs are made."""
    check_detached("no gradient of its slopes is made. Give it detached", alibi=alibi)


def check_inputs(inputs: Inputs, axes: str) -> None:
    """Raise unless the arrays belong together: library, device, dtypes and the shapes of q, k, v and the prefix."""
    _check_arrays(inputs)
    _check_shapes(inputs, axes)
    _check_prefix(inputs, axes)


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


def check_term(name: str, term: Array | None, q: Array) -> None:
    """Raise ShapeError unless a bias or mask fits q [B, H, S, D]; its columns are checked across ranks."""
    if term is None:
        return
    came = tuple(term.shape)
    if not 2 <= term.ndim <= 4:
        raise ShapeError(
            f"{name} has {term.ndim} axes, shape {came}; it must have two to four, the last ones of [B, H, S, N]. "
            "What is one for all rows has 1 in the place of S."
        )
    term = in_four_axes(term)
    for axis, letter in enumerate("BHS"):
        if term.shape[axis] not in (1, q.shape[axis]):
            raise ShapeError(
                f"{name} has shape {came}; its axis {letter} must be 1 or q's {q.shape[axis]} to fit [B, H, S, N]. "
                "With ring= it holds this rank's rows and all columns in global order."
            )


def in_four_axes(term: Array) -> Array:
    """The bias or mask with leading axes of 1."""
    if term.ndim == 4:
        return term
    return namespace(term).reshape(term, (1,) * (4 - term.ndim) + tuple(term.shape))


def _listed(named: dict[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in named.items())
