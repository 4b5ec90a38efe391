"""A call's keywords as text, because an operator takes tensors and strings alone."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ringcore import Call, Documents, DoubleRing, KeywordError, Layout, find_ring, read_documents
from ringcore_torch.groups import check_member, checked_group, group_of_name, groups_of_mesh, is_grid

_GROUP, _GRID = "process group", "grid of groups"
_KEPT = 256  # calls that are remembered
# What calls over a group found out. Calls themselves would keep their group, which ends with the last that holds it.
_known_of_group: WeakKeyDictionary[Any, dict[Any, dict[Any, Any]]] = WeakKeyDictionary()
# Objects that were given as ring or kernels, and what calls over such a ring found out: as long as they live.
_objects: WeakValueDictionary[str, Any] = WeakValueDictionary()
_known_of_object: dict[str, dict[Any, dict[Any, Any]]] = {}
_names: dict[int, str] = {}
_for_ever: dict[str, Any] = {}  # of which nothing tells when they end


def text_of(*, ring: Any, documents: Any = None, cu_seqlens: Any = None, **keywords: Any) -> str:
    """The keywords as JSON; process groups by their name, other objects by a name of this process alone.

    Raises TransportError or KeywordError for a process group or mesh that can be no ring.
    """
    check_member(ring)
    with suppress(KeywordError):  # the call raises it, where the other ranks hear of it
        documents, cu_seqlens = read_documents(documents, cu_seqlens), None
    keywords |= {"documents": documents, "cu_seqlens": cu_seqlens}
    return json.dumps({"ring": None if ring is None else _ring(ring), **keywords}, default=_named)


# torch.compile calls it while it traces, and keeps the text. Set by hand: the decorator's only effect.
text_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call_of(name: str, text: str, **changed: Any) -> Call:
    """The call that these keywords describe, but for those that are ``changed``.

    The same one each time, so that it remembers what it found out about its arrays. ``wrt`` is what Torch will want
    gradients of, so that ranks that differ in it hear so before they wait for a gradient that never comes.
    """
    key = name, text, tuple(changed.items())
    ring = _ring_of(text)
    if ring is None:
        return _kept_call(*key)
    found = _found(ring)  # which is an error if it is gone: then nothing must be noted of it
    while _GRID in ring:  # of a grid its first group stands for both
        ring, found = ring[_GRID][0], found[0]
    known = _known_of_group.setdefault(found, {}) if _GROUP in ring else _known_of_object.setdefault(ring["object"], {})
    if len(known) >= _KEPT:
        known.clear()
    return _call(*key, known.setdefault(key, {}))


def objects_of(text: str) -> list[Any]:
    """The objects of the caller's own that the keywords name: kept by whoever will call again with this text."""
    if '"object": ' not in text:
        return []
    values = list(json.loads(text).values())
    values += [x for value in values if isinstance(value, dict) for x in value.get(_GRID, ())]
    return [_found(x) for x in values if isinstance(x, dict) and "object" in x]


@lru_cache(maxsize=_KEPT)
def _ring_of(text: str) -> dict[str, Any] | None:
    """What stands for the ring in the text."""
    ring: dict[str, Any] | None = json.loads(text)["ring"]
    return ring


@lru_cache(maxsize=_KEPT)
def _kept_call(name: str, text: str, changed: tuple[tuple[str, Any], ...]) -> Call:
    return _call(name, text, changed, {})


def _call(name: str, text: str, changed: tuple[tuple[str, Any], ...], known: dict[Any, Any]) -> Call:
    keywords = {"wrt": (), **json.loads(text, object_hook=_found), **dict(changed)}
    if isinstance(keywords["window"], list):
        keywords["window"] = tuple(keywords["window"])
    return Call(name, **keywords, gradient=bool(keywords["wrt"]), known=known)


def _named(x: Any) -> Any:
    if isinstance(x, Layout):
        return {"layout": [[(r.start, r.stop, r.step) for r in shard] for shard in x.shards], "name": x.name}
    if isinstance(x, Documents):
        return {"runs": x.runs}
    if isinstance(x, DoubleRing):
        return {"ranks of a ring": x.ranks}
    if hasattr(x, "tolist"):  # numbers in an array or a tensor
        return x.tolist()
    return _kept(x)


def _ring(x: Any) -> Any:
    if is_grid(x):
        x = tuple(groups_of_mesh(x))
    if isinstance(x, tuple):
        if len(x) != 2 or any(each is None for each in x):
            find_ring(x)  # which says what is wrong
        return {_GRID: [_ring(each) for each in x]}
    if isinstance(x, ProcessGroup | DeviceMesh):
        return {_GROUP: checked_group(x).group_name}
    return _kept(x)


def _kept(x: Any) -> Any:
    name = _names.get(id(x))
    if name is None:
        name = _names[id(x)] = f"{type(x).__name__} {uuid.uuid4().hex}"
        try:
            finalize(x, _forget, id(x), name).atexit = False
        except TypeError:
            _for_ever[name] = x  # so that no other object gets its id
        else:
            _objects[name] = x
    return {"object": name}


def _forget(number: int, name: str) -> None:
    del _names[number]
    _known_of_object.pop(name, None)


def _found(x: dict[str, Any]) -> Any:
    if _GRID in x:
        return tuple(_found(each) if isinstance(each, dict) else each for each in x[_GRID])
    if _GROUP in x:
        return group_of_name(x[_GROUP])
    if "layout" in x and "name" in x:
        return Layout(tuple(tuple(range(*r) for r in shard) for shard in x["layout"]), x["name"])
    if "ranks of a ring" in x:
        return DoubleRing(x["ranks of a ring"])
    if "runs" in x:
        return Documents(tuple(tuple(tuple(run) for run in runs) for runs in x["runs"]))
    if "object" in x:
        found = _objects.get(x["object"], _for_ever.get(x["object"]))
        if found is None:
            raise KeywordError(
                f"{x['object']!r} is gone, or belongs to another process: a graph compiled with an object of your own "
                "as ring or kernels cannot be stored. Keep the object, and compile in this process."
            )
        return found
    return x
