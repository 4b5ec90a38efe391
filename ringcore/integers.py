"""Whole numbers that keywords hold: Python's, or those in an array of any library, brought to the host."""

from __future__ import annotations

from typing import Any

from ringcore.errors import KeywordError


def is_integer(value: Any) -> bool:
    """Whether ``value`` is a whole number of the host or an array without axes that holds one; bool is none."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return True
    dtype = str(getattr(value, "dtype", "")).rpartition(".")[2]
    return getattr(value, "shape", None) == () and dtype.startswith(("int", "uint"))


def integers(name: str, value: Any, due: str) -> list[int]:
    """The numbers in a sequence or an array of one axis. Raises KeywordError, which says what was ``due``."""
    if isinstance(value, list | tuple) and all(type(entry) is int for entry in value):
        return list(value)
    try:
        length = value.shape[0] if getattr(value, "shape", ()) else len(value)  # not every array has a len
        entries = [value[i] for i in range(length)]
        if not all(is_integer(entry) for entry in entries):
            raise TypeError
    except (TypeError, LookupError) as exc:
        raise KeywordError(f"{name} is {value!r}; {due}.") from exc
    return [int(entry) for entry in entries]


def integers_of_entries(name: str, value: Any, batch: int, one_for_all: bool) -> list[int]:
    """One number for each batch entry; ``one_for_all``: a single one may stand for them."""
    if is_integer(value):
        if not one_for_all:
            raise KeywordError(f"{name} is the number {value}; give one number for each of the {batch} batch entries.")
        return [int(value)] * batch
    due = "it must be an integer, or hold one" if one_for_all else "it must hold one integer"
    due = f"{due} for each of the {batch} batch entries"
    entries = integers(name, value, due)
    if len(entries) != batch:
        raise KeywordError(f"{name} has {len(entries)} entries; {due}.")
    return entries
