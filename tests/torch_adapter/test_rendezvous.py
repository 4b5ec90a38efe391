"""Torch's rendezvous of symmetric memory, among ranks that had differently many of them with others before."""

import gc
from datetime import timedelta

import pytest
from torch.distributed import HashStore, PrefixStore
from torch.distributed.distributed_c10d import _resolve_process_group

from ringcore_torch.rendezvous import Meeting


def exchange(meetings, numbers, word):
    """What each rank hears of all, by keys as Torch makes them of its process's own number."""
    stores = [_resolve_process_group(meeting.name).get_group_store() for meeting in meetings]
    ends = [PrefixStore(f"Memory/{number}", store) for number, store in zip(numbers, stores, strict=True)]
    for rank, end in enumerate(ends):
        assert not end.check([str(rank)])
        end.set(str(rank), f"{word}{rank}")
        end.add("all", 1)
    for end in ends:
        end.wait([str(rank) for rank in range(len(ends))])
    return [[end.get(str(rank)).decode() for rank in range(len(ends))] for end in ends]


def test_ranks_meet_whatever_numbers_their_processes_count():
    store = HashStore()
    store.set_timeout(timedelta(seconds=5))
    meetings = [Meeting(store, rank, 3) for rank in range(3)]
    for word, numbers in (("a", (0, 5, 2)), ("b", (1, 6, 9)), ("c", (3, 7, 11))):
        assert exchange(meetings, numbers, word) == [[f"{word}{rank}" for rank in range(3)]] * 3


def test_a_group_ends_with_its_meeting():
    meeting = Meeting(HashStore(), 1, 2)
    name = meeting.name
    group = _resolve_process_group(name)
    assert (group.rank(), group.size()) == (1, 2)
    del group, meeting
    gc.collect()
    with pytest.raises(RuntimeError, match=r"resolve"):
        _resolve_process_group(name)
