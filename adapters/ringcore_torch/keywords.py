"""A call's keywords as text, because an operator takes tensors and strings alone."""

from __future__ import annotations

import json
import uuid
from functools import lru_cache
from typing import Any

from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from ringcore import Call, KeywordError, Layout

_GROUP = "process group"
_objects: dict[str, Any] = {}
_names: dict[int, str] = {}


def text_of(**keywords: Any) -> str:
    """The keywords as JSON; process groups by their name, other objects by a name of this process alone."""
    return json.dumps(keywords, default=_named)


# torch.compile calls it while it traces, and keeps the text. Set by hand: the decorator's only effect.
text_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call_of(name: str, text: str, **further: Any) -> Call:
    """The call that these keywords describe; the same one each time, so that it remembers what it found out."""
    keywords = json.loads(text) if _GROUP in text else None
    group = None if keywords is None else _resolved(keywords["ring"])
    return _call(name, text, tuple(further.items()), group)


@lru_cache(maxsize=256)
def _call(name: str, text: str, further: tuple[tuple[str, Any], ...], group: ProcessGroup | None) -> Call:
    """``group`` is what the text names: another one of that name may come after it."""
    keywords = json.loads(text, object_hook=_found)
    if isinstance(keywords["window"], list):
        keywords["window"] = tuple(keywords["window"])
    wanted = dict(further)
    return Call(name, **keywords, gradient="wrt" in wanted, **wanted)


def _named(x: Any) -> Any:
    if isinstance(x, Layout):
        return {"layout": [[(r.start, r.stop, r.step) for r in shard] for shard in x.shards], "name": x.name}
    if isinstance(x, DeviceMesh) and x.ndim == 1:
        x = x.get_group()
    if isinstance(x, ProcessGroup):
        return {_GROUP: x.group_name}
    if hasattr(x, "tolist"):  # numbers in an array or a tensor
        return x.tolist()
    name = _names.get(id(x))
    if name is None:
        name = _names[id(x)] = f"{type(x).__name__} {uuid.uuid4().hex}"
        _objects[name] = x  # kept for ever: so that no other object gets its id
    return {"object": name}


def _resolved(x: Any) -> Any:
    """The process group of this name, or nothing if x names none."""
    if not isinstance(x, dict) or _GROUP not in x:
        return None
    return distributed_c10d._resolve_process_group(x[_GROUP])  # type: ignore[attr-defined]


def _found(x: dict[str, Any]) -> Any:
    if _GROUP in x:
        return _resolved(x)
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
