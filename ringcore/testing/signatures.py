"""Other people's functions as attention that is asked: how they want their arrays, and what they call keywords."""

from __future__ import annotations

import importlib
import inspect
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ringcore.testing.asking import ACCEPTS, Attention
from ringcore.testing.libraries import first


@dataclass(frozen=True)
class Signature:
    """How functions of a kind are called.

    keywords: what each of ACCEPTS is called there. library: whose arrays they take. sequence_first: whether arrays are
    [B, S, H, D]. broad_mask: whether masks have four axes, [B, H, S, N]. grouped: whether key heads may be
    fewer, or the keyword that lets them be.
    """

    keywords: dict[str, str]
    library: str
    sequence_first: bool = False
    broad_mask: bool = False
    grouped: bool | str = True


SIGNATURES = {
    "ringcore": Signature({name: name for name in ACCEPTS if name not in ("grouped", "dilated")}, "numpy"),
    "sdpa": Signature(
        {"causal": "is_causal", "scale": "scale", "mask": "attn_mask", "bias": "attn_mask"},
        "torch",
        grouped="enable_gqa",
    ),
    "flash-attn": Signature(
        {
            "causal": "causal",
            "window": "window_size",
            "scale": "softmax_scale",
            "softcap": "softcap",
            "alibi": "alibi_slopes",
        },
        "torch",
        sequence_first=True,
    ),
    "jax": Signature(
        {"causal": "is_causal", "window": "local_window_size", "scale": "scale", "mask": "mask", "bias": "bias"},
        "jax",
        sequence_first=True,
        broad_mask=True,
    ),
    # The function of the report that ringcore began with: (q, k, v, ring_size), [B, S, H, D].
    "seed": Signature({"causal": "causal"}, "torch", sequence_first=True, grouped=False),
}
_RING = "ring_size"
_OF_FILES = "attention", "ACCEPTS", "LIBRARY"
_JOINED = "ring", "group", "process_group", "comm"


def load(target: str) -> Attention:
    """The function that "package.module:function" names. Whatever goes wrong as it is imported is raised as it is."""
    module, _, name = target.partition(":")
    if not name:
        raise ValueError(f"the target is {target!r}; it must be package.module:function.")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} is a {type(found).__name__}; it must be a function.")
    return found  # type: ignore[no-any-return]


class Means(NamedTuple):
    """A function as attention that is asked.

    accepts: of ACCEPTS, what it takes. library: whose arrays. joins: whether it takes what joins several processes.
    """

    attention: Attention
    accepts: tuple[str, ...]
    library: str
    joins: bool


def signature_of(name: str) -> Signature | dict[str, Any]:
    """One of SIGNATURES, or what a Python file of this name says, which is run now.

    It has ``attention(function, q, k, v, *, ring_size, **keywords)``, ``ACCEPTS`` and ``LIBRARY``. Raises ValueError
    for one without them.
    """
    if name in SIGNATURES:
        return SIGNATURES[name]
    sys.path.append(str(Path(name).resolve().parent))  # what lies beside it may be imported
    found = runpy.run_path(name)
    missing = [each for each in _OF_FILES if each not in found]
    if missing:
        raise ValueError(
            f"{name} has no {' and no '.join(missing)}; a signature's file must have attention(function, q, k, v, *, "
            "ring_size, **keywords), ACCEPTS, the keywords that it takes, and LIBRARY, whose arrays it takes."
        )
    return found


def attention_of(function: Attention, kind: Signature | dict[str, Any], ring: Any = None) -> Means:
    """The function as attention that is asked, by what its signature means.

    ring: what joins the processes, where several are asked together: the function gets it as ``ring``, ``group``,
    ``process_group`` or ``comm``, whichever it takes first, and a file's as ``ring``.
    """
    if isinstance(kind, dict):
        own, together = kind["attention"], {} if ring is None else {"ring": ring}

        def custom(*arrays: Any, **keywords: Any) -> Any:
            return own(function, *arrays, **keywords, **together)

        return Means(custom, tuple(kind["ACCEPTS"]), kind["LIBRARY"], "ring" in inspect.signature(own).parameters)
    takes = _parameters(function)
    accepts = tuple(name for name, theirs in kind.keywords.items() if takes(theirs))
    if kind.grouped is True or (isinstance(kind.grouped, str) and takes(kind.grouped)):
        accepts = (*accepts, "grouped")
    joined = next((name for name in _JOINED if takes(name)), None)

    def attention(q: Any, k: Any, v: Any, *, ring_size: int, **keywords: Any) -> Any:
        named = {kind.keywords[name]: x for name, x in keywords.items()}
        if kind.broad_mask and "mask" in keywords:
            named[kind.keywords["mask"]] = keywords["mask"][None, None]
        if ring is None and takes(_RING):
            named[_RING] = ring_size
        if ring is not None and joined is not None:
            named[joined] = ring
        if isinstance(kind.grouped, str) and q.shape[1] != k.shape[1]:
            named[kind.grouped] = True
        if not kind.sequence_first:
            return function(q, k, v, **named)
        out = first(function(*(x.swapaxes(1, 2) for x in (q, k, v)), **named))
        return out.swapaxes(1, 2) if hasattr(out, "swapaxes") else out  # what is no array is told by who asked

    return Means(attention, accepts, kind.library, joined is not None)


def _parameters(function: Attention) -> Callable[[str], bool]:
    """Whether the function takes a keyword, as far as it says."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in: it does not say
        return lambda name: name != _RING
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return lambda name: name in parameters or anything
