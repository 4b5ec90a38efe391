"""Finding adapters by entry point: kernels for an array library, a transport for a ring object."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import array_api_compat

from ringcore.errors import KeywordError, MissingDependency, RingcoreError, UnsupportedError
from ringcore.grid import Grid, grid_of
from ringcore.inputs import library_name
from ringcore.merge import StandardArithmetic
from ringcore.partial import device_kind, dtype_name
from ringcore.probation import fault
from ringcore.protocols import Arithmetic, Kernels, Transport
from ringcore.tile import ReferenceKernels
from ringcore.values import Array

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def choose_kernels(
    asked: Kernels | str | None, q: Array, v: Array, needs: frozenset[str], sharers: int = 1
) -> tuple[Kernels, list[str]]:
    """The kernels for arrays like q and v that can do all of ``needs``, and why each one before them was passed over.

    asked: kernels, their name, or None for the best that can.
    needs: out of bias, mask, softcap, window, gradient. sharers: how many processes share this machine's cores.
    Raises UnsupportedError if the asked ones cannot, KeywordError if there are none of that name.
    """
    if asked is not None:
        kernels = _named(asked, sharers) if isinstance(asked, str) else asked
        if isinstance(kernels, type) or not isinstance(kernels, Kernels):
            raise KeywordError(f"kernels is {asked!r}; it must be a name or have capabilities, forward and backward.")
        if lack := _lack(kernels, q, v, needs) or fault(kernels, q, v, needs):
            raise UnsupportedError(f"the kernels {kernels.capabilities.name!r} cannot do this call: {lack}.")
        return kernels, []
    passed: list[str] = []
    able: list[Kernels] = []
    for name in sorted(_points("ringcore.kernels")):
        if elsewhere := _elsewhere(*_place(name), q):
            passed.append(f"{name}: {elsewhere}")
            continue
        found = _loaded(name, sharers)
        if isinstance(found, RingcoreError):
            passed.append(f"{name}: {found}")
        elif lack := _lack(found, q, v, needs):
            passed.append(f"{name}: {lack}")
        else:
            able.append(found)
    for kernels in sorted(able, key=lambda kernels: -kernels.capabilities.preferred(q.shape[2])):
        if not (wrong := fault(kernels, q, v, needs)):
            return kernels, passed
        passed.append(f"{kernels.capabilities.name}: {wrong}")
    return ReferenceKernels(), passed


def find_arithmetic(q: Array) -> Arithmetic:
    """What merges and finishes partials of q's library: an adapter's own, or the array API standard's."""
    point = _points("ringcore.arithmetic").get(library_name(q))
    return StandardArithmetic() if point is None else _loaded_arithmetic(point.name)


def find_ring(ring: Any, like: Any = None) -> Transport | Grid:
    """What the user gave as ``ring``: a transport, as `find_transport`, or a grid of two."""
    carry = _carrier(library_name(like)) if array_api_compat.is_array_api_obj(like) else None
    found = _host_ring(ring)
    if carry is None:
        return found
    return found.carried(carry) if isinstance(found, Grid) else carry(found)


def _host_ring(ring: Any) -> Transport | Grid:
    """What carries host memory."""
    if isinstance(ring, Grid):
        return ring
    if isinstance(ring, tuple):
        if len(ring) != 2:
            raise KeywordError(f"ring holds {len(ring)} groups; a grid has two, (between groups, inside one).")
        return grid_of(*map(find_transport, ring))
    return _host_transport(ring)


def find_transport(ring: Any, like: Any = None) -> Transport:
    """The transport for what the user gave as ``ring``: itself, or an adapter's for a communicator.

    like: an array of those that travel. What carries host memory is then put under what carries this library's arrays,
        if they have an adapter of their own. Nothing is sent for that; what is no array is left for the checks.
    Raises KeywordError if nothing knows this kind of object, or if it is a grid.
    """
    if not isinstance(ring, tuple | Grid) and not isinstance(found := find_ring(ring, like), Grid):
        return found
    raise KeywordError("ring is a grid of heads and ring, which ring_attention alone takes. Give one ring.")


@lru_cache(maxsize=64)
def _carrier(name: str) -> Callable[[Transport], Transport] | None:
    """What carries arrays of this library over any transport, if it has an adapter for that."""
    point = _points("ringcore.carriers").get(name)
    return None if point is None else _load(point)


def _host_transport(ring: Any) -> Transport | Grid:
    kind: type = type(ring)
    adapt = _transport_adapter(kind)
    if adapt is not None:
        transport: Transport | Grid = adapt(ring)
        return transport
    if isinstance(ring, Transport):
        return ring
    raise KeywordError(
        f"ring is a {type(ring).__module__}.{type(ring).__qualname__}; it must be a transport or a communicator "
        f"of {', '.join(sorted(_points('ringcore.transports'))) or 'an installed adapter (there is none)'}."
    )


@lru_cache(maxsize=64)
def _transport_adapter(kind: type) -> Callable[[Any], Transport | Grid] | None:
    """What makes transports of objects of this type, if their library has an adapter."""
    point = _points("ringcore.transports").get(kind.__module__.partition(".")[0])
    return None if point is None else _load(point)


def autograd_adapter(kind: type) -> str | None:
    """The name of the module, then loaded, that records gradients of attention on arrays of this type; None for none.

    Its ``attend`` is like ``ring_attention``, but answers NotImplemented to arguments that must be refused.
    """
    return _autograd_adapter(kind)


# torch.compile calls it while it traces, and keeps the name. The decorator for this, in Torch, does nothing else.
autograd_adapter._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _autograd_adapter(kind: type) -> str | None:
    modules = {base.__module__.partition(".")[0] for base in kind.__mro__}
    for name, point in _points("ringcore.autograd").items():
        if name in modules:
            return str(_load(point).__name__)
    return None


def _lack(kernels: Kernels, q: Array, v: Array, needs: frozenset[str]) -> str | None:
    """What the kernels lack for this call, in words."""
    can = kernels.capabilities
    if elsewhere := _elsewhere(can.libraries, can.devices, q):
        return elsewhere
    if dtype_name(q) not in can.dtypes:
        return f"they take {', '.join(sorted(can.dtypes))}, not {dtype_name(q)}"
    widths = q.shape[3], v.shape[3]
    if can.largest_head is not None and max(widths) > can.largest_head:
        return f"their widest head is {can.largest_head}, but this call has {max(widths)}"
    if any(width % can.head_multiple for width in widths):
        return (
            f"their heads have a multiple of {can.head_multiple} columns, but this call has {widths[0]} and {widths[1]}"
        )
    if can.equal_heads and widths[0] != widths[1]:
        return f"their k and v are equally wide, but this call has {widths[0]} and {widths[1]} columns"
    for need in sorted(needs):
        if not getattr(can, need):
            return f"they have no {need.replace('_', ' ')}"
    return None


def _elsewhere(libraries: frozenset[str], devices: frozenset[str], q: Array) -> str | None:
    """Why kernels for these libraries and kinds of device do not take q; an empty set is any."""
    came, device = library_name(q), device_kind(q)
    if libraries and came not in libraries:
        return f"they take arrays of {', '.join(sorted(libraries))}, not of {came}"
    if devices and device not in devices:
        return f"they compute on {', '.join(sorted(devices))}, not on {device}"
    return None


@lru_cache(maxsize=64)
def _place(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The library and the kind of device in a name: "library", "library.device" or "library.device.more"."""
    module, *device = name.split(".")[:2]
    return frozenset({module}), frozenset(device)


def _named(name: str, sharers: int) -> Kernels:
    if name == "reference":
        return ReferenceKernels()
    if name not in _points("ringcore.kernels"):
        known = ", ".join(["reference", *sorted(_points("ringcore.kernels"))])
        raise KeywordError(f"kernels is {name!r}; the installed ones are {known}.")
    kernels = _loaded(name, sharers)
    if isinstance(kernels, RingcoreError):
        raise type(kernels)(*kernels.args)  # a new one: a traceback that is raised again grows, and keeps arrays
    return kernels


@lru_cache(maxsize=16)
def _loaded(name: str, sharers: int) -> Kernels | RingcoreError:
    """The kernels, or why there are none here: looked for once."""
    try:
        kernels: Kernels = _load(_points("ringcore.kernels")[name])(sharers=sharers)
    except (MissingDependency, UnsupportedError) as error:
        return error.with_traceback(None)
    return kernels


@lru_cache(maxsize=16)
def _loaded_arithmetic(name: str) -> Arithmetic:
    arithmetic: Arithmetic = _load(_points("ringcore.arithmetic")[name])
    return arithmetic


@lru_cache(maxsize=4)
def _points(group: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # here: it takes a quarter of the time to import ringcore

    return {point.name: point for point in entry_points(group=group)}


def _load(point: EntryPoint) -> Any:
    """The entry point's object; a library that it needs, and that is not there or broken, becomes our error."""
    package = point.module.partition(".")[0]
    extra = package.removeprefix("ringcore_")
    try:
        return point.load()
    except RingcoreError:
        raise
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] in ("ringcore", package):
            raise
        raise MissingDependency(
            f'{package} needs {exc.name}, which is not installed: pip install "ringcore[{extra}]".'
        ) from exc
    except (ImportError, OSError, RuntimeError) as exc:  # a half of it is missing, or what it was built for
        if (getattr(exc, "name", None) or "").partition(".")[0] in ("ringcore", package):
            raise
        raise MissingDependency(
            f"{package} cannot be imported, for what it needs fails: {type(exc).__name__}: {exc}. "
            f'Try pip install --upgrade "ringcore[{extra}]".'
        ) from exc
