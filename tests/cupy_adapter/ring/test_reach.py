"""Which ranks reach each other's memory, and what carries where they do not."""

import pytest
from cupy.cuda import runtime

from ringcore import KeywordError, UnsupportedError
from ringcore_cupy.reach import decide, unreached


def note(gpu, node=0, machine="a", asked=None, nccl=True, device=False, uuid="01"):
    return {
        "gpu": gpu,
        "uuid": uuid,
        "node": node,
        "machine": machine,
        "asked": asked,
        "nccl": nccl,
        "device memory": device,
    }


def buses(monkeypatch, *gpus, apart=(), uuids=None):
    """The GPUs that this process sees, by their numbers here."""
    properties = lambda number: {"uuid": uuids[number] if uuids else b"\1"}  # noqa: E731
    monkeypatch.setattr(runtime, "getDeviceProperties", properties)
    monkeypatch.setattr(runtime, "getDeviceCount", lambda: len(gpus))
    monkeypatch.setattr(runtime, "deviceGetPCIBusId", lambda number: gpus[number])
    access = lambda here, there: here != there and {gpus[here], gpus[there]} not in apart  # noqa: E731
    monkeypatch.setattr(runtime, "deviceCanAccessPeer", access)


def test_gpus_are_known_by_their_place_on_the_bus(monkeypatch):
    buses(monkeypatch, "C", "A", "B", apart=[{"A", "B"}])
    notes = [note("A"), note("B"), note("C"), note("A")]
    assert unreached(notes, 0, 1) == {"1": "the GPU A cannot access B"}


def test_parts_of_one_gpu_are_different(monkeypatch):
    buses(monkeypatch, "A", uuids=[b"\xaa"])
    assert unreached([note("A", uuid="aa"), note("A", uuid="bb")], 0, 0) == {
        "1": "rank 0 does not see the GPU A with UUID bb (CUDA_VISIBLE_DEVICES)"
    }


def test_uuids_that_end_early_do_not_make_gpus_one(monkeypatch):
    buses(monkeypatch, "A", "B", uuids=[b"", b""], apart=[{"A", "B"}])
    notes = [note("A", uuid=""), note("B", uuid="")]
    assert unreached(notes, 0, 0) == {"1": "the GPU A cannot access B"}
    assert unreached(notes, 1, 1) == {"0": "the GPU B cannot access A"}


def test_what_is_not_reached_and_why(monkeypatch):
    buses(monkeypatch, "A", "B")
    notes = [note("A"), note("B"), note("B", node=1), note("B", machine="b"), note("D")]
    said = unreached(notes, 0, 0)
    assert set(said) == {"2", "3", "4"}
    assert said["2"] == said["3"] == "they are on different nodes"
    assert said["4"] == "rank 0 does not see the GPU D with UUID 01 (CUDA_VISIBLE_DEVICES)"


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({}, ("nccl", "host")),
        ({"device": True}, ("nccl", "mpi", "host")),
        ({"nccl": False}, ("host",)),
        ({"nccl": False, "device": True}, ("mpi", "host")),
    ],
)
def test_the_best_that_all_ranks_have(changes, others):
    ways = decide([note("A"), note("B", **changes)] if not changes else [note(g, **changes) for g in "AB"], [{}, {}])
    assert ways.near == (frozenset({1}), frozenset({0}))
    assert ways.others == others
    assert ways.complete


def test_one_rank_that_lacks_it_is_enough():
    ways = decide([note("A", device=True), note("B", nccl=False)], [{"1": "far"}, {}])
    assert ways.near == (frozenset(), frozenset())
    assert ways.others == ("host",)
    assert ways.why.startswith(
        "ranks 0 and 1 do not share memory: far. CuPy finds no NCCL on the ranks [1]: pip install"
    )
    assert "the ranks [1] does not say that it takes a GPU's memory" in ways.why


def test_memory_is_used_where_both_reach_the_other():
    ways = decide([note(gpu) for gpu in "ABC"], [{"1": "x"}, {}, {}])
    assert ways.near == (frozenset({2}), frozenset({2}), frozenset({0, 1}))
    assert not ways.complete


def test_one_gpu_on_two_machines_is_two():
    assert "nccl" in decide([note("A"), note("A", machine="b")], [{"1": "x"}, {"0": "x"}]).others
    assert "nccl" not in decide([note("A"), note("A", node=1)], [{"1": "x"}, {"0": "x"}]).others


@pytest.mark.parametrize(
    ("asked", "notes", "far", "error", "said"),
    [
        ("ipc", "AB", [{}, {"0": "no"}], UnsupportedError, "rank 0 does not reach the memory of rank 1: no"),
        ("nccl", "AA", [{}, {}], UnsupportedError, "the ranks \\[0, 1\\] share a GPU"),
        ("mpi", "AB", [{}, {}], UnsupportedError, "device_buffers=True"),
        (("ipc", None), "AB", [{}, {}], KeywordError, "different carriers: \\['ipc', None\\]"),
    ],
)
def test_what_was_asked_for_and_cannot_is_refused(asked, notes, far, error, said):
    names = asked if isinstance(asked, tuple) else (asked, asked)
    with pytest.raises(error, match=said):
        decide([note(gpu, asked=name) for gpu, name in zip(notes, names, strict=True)], far)


@pytest.mark.parametrize("asked", ["nccl", "host"])
def test_what_was_asked_for_carries_all(asked):
    ways = decide([note(gpu, asked=asked) for gpu in "AB"], [{}, {}])
    assert (ways.near, ways.others) == ((frozenset(), frozenset()), (asked,))
