"""What calls found out about arrays, for later ones with equal keywords on the same ring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import array_api_compat

from ringcore.agreement import Agreed
from ringcore.arguments import Arguments
from ringcore.grid import Grid
from ringcore.inputs import Inputs
from ringcore.layout import Layout
from ringcore.protocols import Kernels, Transport
from ringcore.routes import DoubleRing
from ringcore.session import LocalSession
from ringcore.values import Array

Key = TypeVar("Key")
Value = TypeVar("Value")

_KEPT = 64  # signatures, or keywords of calls on one ring
_PIECES = 256  # of a layout that is told by its text
_PLAIN = (type(None), bool, int, float, str, DoubleRing)
_known_of_ring: WeakKeyDictionary[Transport | Grid, dict[str, Memory]] = WeakKeyDictionary()


@dataclass
class Known:
    """What a call found out about arrays of one signature; it holds none of them.

    check_array: what their library must still be asked about each one. local: where it runs without a ring of
    processes. common: what the ranks of a ring must have in common; agreed: what they agreed on, by their lengths.
    decoded: how far a cache was filled when it was last decoded.
    """

    arguments: Arguments
    kernels: Kernels
    check_array: Callable[[Array], None] | None = None
    local: LocalSession | None = None
    common: bytes | None = None
    agreed: dict[tuple[tuple[int, ...], tuple[int, ...]], Agreed] = field(default_factory=dict)
    decoded: Any = None

    def agree_on(self, agreed: Agreed) -> None:
        """Remember what the ranks agreed on."""
        keep(self.agreed, (agreed.q_lengths, agreed.k_lengths), agreed)


Memory = dict[Any, Known]
"""By the signature of arrays."""


def memory_of(keywords: Mapping[str, Any], transport: Transport | Grid | None) -> Memory:
    """What calls with these keywords found out on this ring, while it lives; nothing, of keywords that have no text."""
    if not all(map(_plain, keywords.values())):
        return {}
    key = repr(keywords)  # in which 1, 1.0 and True differ
    if transport is None:
        return _alone(key)
    try:
        memories = _known_of_ring.setdefault(transport, {})
    except TypeError:  # one of its own kind, that cannot be held weakly
        return {}
    if key not in memories:
        keep(memories, key, {})
    return memories[key]


def keep(kept: dict[Key, Value], key: Key, value: Value) -> None:
    """Put the value there; where many are, all of them are forgotten at once for a new one."""
    if key not in kept and len(kept) >= _KEPT:
        kept.clear()
    kept[key] = value


def signature_of(inputs: Inputs) -> tuple[Any, ...]:
    """All of the arrays that decides what may be done with them; empty for what are no arrays."""
    try:
        signature = tuple(map(_signature, inputs))
        hash(signature)
    except (AttributeError, TypeError):  # the checks say so
        return ()
    return signature


@lru_cache(maxsize=256)
def _alone(key: str) -> Memory:
    """Of calls without a ring of processes, by their keywords."""
    return {}


def _plain(x: Any) -> bool:
    """Whether x is all that its text says."""
    if type(x) is Layout:
        return sum(map(len, x.shards)) <= _PIECES
    return type(x) in _PLAIN or (type(x) in (tuple, list) and all(map(_plain, x)))


def _signature(x: Any) -> Any:
    """All of an array that decides what may be done with it, but for its numbers and strides."""
    return None if x is None else (type(x), tuple(x.shape), x.dtype, _device(x), getattr(x, "layout", None))


def _device(x: Array) -> Any:
    """The device of x, as something that can be hashed: CuPy's cannot."""
    device = array_api_compat.device(x)
    return device if type(device).__hash__ is not None else str(device)
