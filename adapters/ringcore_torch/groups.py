"""Process groups, and which of them a ring can be made of."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringcore import KeywordError, TransportError

_RING_NAMES, _HEAD_NAMES = ("ring", "cp", "context"), ("heads", "head", "ulysses", "sp")
_rings_made: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def checked_group(ring: Any) -> dist.ProcessGroup:
    """The process group that ``ring`` is or has.

    Raises TransportError unless this process is a member of it, KeywordError for what has no group, or several.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise TransportError(
            "torch.distributed is not initialised, so there is no ring. Call torch.distributed.init_process_group() "
            "first."
        )
    if isinstance(ring, DeviceMesh):
        ring = _group_of_mesh(ring)
    if not isinstance(ring, dist.ProcessGroup):
        check_member(ring)
        raise KeywordError(
            f"ring is a {type(ring).__module__}.{type(ring).__qualname__}; it must be a ProcessGroup or a DeviceMesh "
            "of one dimension."
        )
    try:
        dist.get_process_group_ranks(ring)
    except (KeyError, ValueError, RuntimeError) as exc:
        raise _destroyed(exc) from exc
    return ring


def group_of_name(name: str) -> dist.ProcessGroup:
    """The process group of this name. Raises TransportError if it was destroyed."""
    try:
        group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    except RuntimeError as exc:
        raise _destroyed(exc) from exc
    return group


def check_member(ring: Any) -> None:
    """Raise TransportError for what torch.distributed gives a process that is not in a group it made."""
    if isinstance(ring, int) and ring == dist.GroupMember.NON_GROUP_MEMBER:
        raise TransportError(
            f"rank {dist.get_rank()} of the world is not in the process group given as ring. Ranks outside of the ring "
            "must not make the call."
        )


def next_name(group: dist.ProcessGroup) -> str:
    """A name for the next ring over this group, equal on every rank that makes the same rings."""
    number = _rings_made[group] = _rings_made.get(group, -1) + 1
    return str(number)


def _destroyed(cause: Exception) -> TransportError:
    return TransportError(
        f"torch.distributed does not know the process group given as ring ({cause}): it was destroyed. Make a new one, "
        "on every rank: torch.distributed.new_group(...)."
    )


def is_grid(ring: Any) -> bool:
    """Whether it is a mesh of a ring and heads: of two dimensions that have no names, or such as say so.

    A mesh of data and sequence, say, is none: a ring along the data would mix what is not one sequence.
    """
    if not isinstance(ring, DeviceMesh) or ring.ndim != 2:
        return False
    names = ring.mesh_dim_names
    return names is None or (names[0] in _RING_NAMES and names[1] in _HEAD_NAMES)


def groups_of_mesh(mesh: DeviceMesh) -> list[Any]:
    """The groups along each dimension of a mesh. Raises TransportError unless this process is in it."""
    if mesh.get_coordinate() is None:
        raise TransportError(
            f"rank {dist.get_rank()} of the world is not in the mesh given as ring. Ranks outside of the ring must not "
            "make the call."
        )
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]


def _group_of_mesh(mesh: DeviceMesh) -> Any:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        raise KeywordError(
            f"ring is a mesh of {mesh.ndim} dimensions{f', {names}' if names else ''}; a ring runs along one: give "
            + (f"mesh[{names[0]!r}]" if names else "mesh.get_group(0)")
            + '. A grid has two, "ring" and "heads", or is two groups: (between groups, inside one).'
        )
    (group,) = groups_of_mesh(mesh)
    return group
