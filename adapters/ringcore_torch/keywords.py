"""A call's keywords as text, because an operator takes tensors and strings alone."""

from __future__ import annotations

import json
import uuid
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ringcore import Call, KeywordError, Layout
from ringcore_torch.groups import check_member, checked_group, group_of_name

_GROUP = "process group"
_KEPT = 256  # calls that are remembered
# What calls over a group found out. Calls themselves would keep their group, which ends with the last that holds it.
_known_of_group: WeakKeyDictionary[Any, dict[Any, dict[Any, Any]]] = WeakKeyDictionary()
_objects: dict[str, Any] = {}
_names: dict[int, str] = {}


def text_of(*, ring: Any, **keywords: Any) -> str:
    """The keywords as JSON; process groups by their name, other objects by a name of this process alone.

    Raises TransportError or KeywordError for a process group or mesh that can be no ring.
    """
    check_member(ring)
    return json.dumps({"ring": None if ring is None else _ring(ring), **keywords}, default=_named)


# torch.compile calls it while it traces, and keeps the text. Set by hand: the decorator's only effect.
text_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call_of(name: str, text: str, **changed: Any) -> Call:
    """The call that these keywords describe, but for those that are ``changed``.

    The same one each time, so that it remembers what it found out about its arrays. ``wrt`` is what Torch will want
    gradients of, so that ranks that differ in it hear so before they wait for a gradient that never comes.
    """
    key = name, text, tuple(changed.items())
    if f'"ring": {{"{_GROUP}": ' not in text:
        return _kept_call(*key)
    group = _found(json.loads(text)["ring"])
    known = _known_of_group.setdefault(group, {})
    if len(known) >= _KEPT:
        known.clear()
    return _call(*key, known.setdefault(key, {}))


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
    if hasattr(x, "tolist"):  # numbers in an array or a tensor
        return x.tolist()
    return _kept(x)


def _ring(x: Any) -> Any:
    if isinstance(x, ProcessGroup | DeviceMesh):
        return {_GROUP: checked_group(x).group_name}
    return _kept(x)


def _kept(x: Any) -> Any:
    name = _names.get(id(x))
    if name is None:
        name = _names[id(x)] = f"{type(x).__name__} {uuid.uuid4().hex}"
        _objects[name] = x  # kept for ever: so that no other object gets its id
    return {"object": name}


def _found(x: dict[str, Any]) -> Any:
    if _GROUP in x:
        return group_of_name(x[_GROUP])
    if "layout" in x and "name" in x:
        return Layout(tuple(tuple(range(*r) for r in shard) for shard in x["layout"]), x["name"])
    if "object" in x:
        if x["object"] not in _objects:
            raise KeywordError(
                f"{x['object']!r} belongs to another process: a graph compiled with an object of your own as ring or "
                "kernels cannot be stored. Compile it in this process."
            )
        return _objects[x["object"]]
    return x
