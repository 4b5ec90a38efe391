"""Groups over which Torch can make symmetric memory, whatever else a process made before."""

from __future__ import annotations

import itertools
import weakref
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store, _register_process_group, _unregister_process_group
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

_made = itertools.count()


class Meeting:
    """A process group of the same ranks that does nothing but let Torch rendezvous; it ends with this object.

    Torch numbers the exchanges of its rendezvous by process, not by group: members of one group that had not equally
    many with others wait for each other under different numbers, for ever. Here each exchange has the number that it
    has among these ranks.

    store: where all of them read and write, and nothing else does.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = Renumbered(PrefixStore("meeting", store))  # Torch holds the part in C++ alone
        self.group: Any = ProcessGroup(self._store, rank, size)
        self.name = _next_name()
        self.group._set_group_name(self.name)
        _register_process_group(self.name, self.group)
        weakref.finalize(self, _unregister_process_group, self.name)


def _next_name() -> Any:
    return f"ringcore/{next(_made)}"


class Renumbered(Store):
    """A store in whose keys, ``what/number/...``, numbers count from 0 for each what, as they first come."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._numbers: dict[str, dict[str, int]] = {}

    def set(self, key: str, value: Any) -> None:
        """As Store.set."""
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        """As Store.get."""
        return self._store.get(self._key(key))

    def add(self, key: str, value: int) -> int:
        """As Store.add."""
        return self._store.add(self._key(key), value)

    def check(self, keys: list[str]) -> bool:
        """As Store.check."""
        return self._store.check([self._key(key) for key in keys])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """As Store.wait."""
        self._store.wait([self._key(key) for key in keys], *(() if timeout is None else (timeout,)))

    def _key(self, key: str) -> str:
        what, _, rest = key.partition("/")
        number, slash, rest = rest.partition("/")
        known = self._numbers.setdefault(what, {})
        return f"{what}/{known.setdefault(number, len(known))}{slash}{rest}"
