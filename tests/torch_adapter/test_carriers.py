"""Which carrier blocks on GPUs get, told from what the ranks say of themselves."""

import pytest
import torch.distributed as dist

from ringcore import KeywordError, UnsupportedError
from ringcore_torch import TorchTransport
from ringcore_torch.reach import decide


def notes(*changed, asked=None):
    """What ranks on GPUs of one machine say, but for the changes, one for each rank."""
    plain = {"machine": "one", "asked": asked, "nccl": True}
    return [{**plain, "gpu": f"GPU {rank}", **change} for rank, change in enumerate(changed)]


NEAR = [[], []]


@pytest.mark.parametrize(
    ("asked", "changed", "far", "chosen"),
    [
        (None, ({}, {}), NEAR, "peer_memory"),
        (None, ({}, {"nccl": False}), NEAR, "peer_memory"),
        (None, ({}, {"machine": "two"}), NEAR, "nccl"),
        (None, ({}, {}), [[], [0]], "nccl"),
        ("peer_memory", ({}, {}), NEAR, "peer_memory"),
        ("nccl", ({}, {}), NEAR, "nccl"),
        # GPUs are told apart by their machines too.
        (None, ({"gpu": "0"}, {"gpu": "0", "machine": "two"}), NEAR, "nccl"),
    ],
)
def test_the_first_that_can_or_the_one_asked_for(asked, changed, far, chosen):
    assert decide(notes(*changed, asked=asked), far) == chosen


@pytest.mark.parametrize(
    ("asked", "changed", "far", "error", "words"),
    [
        ("peer_memory", ({}, {"machine": "two"}), NEAR, UnsupportedError, "several machines.*carrier='peer_memory'"),
        ("peer_memory", ({}, {}), [[1], []], UnsupportedError, r"does not reach, or not see, are \[\[1\], \[\]\]"),
        ("nccl", ({}, {"nccl": False}), NEAR, UnsupportedError, r"without NCCL on the ranks \[1\]"),
        (None, ({"nccl": False}, {"machine": "two"}), NEAR, UnsupportedError, r"several machines.*the ranks \[0\]"),
        (None, ({}, {"asked": "nccl"}), NEAR, KeywordError, r"different carriers: \[None, 'nccl'\]"),
    ],
)
def test_what_no_carrier_can_is_refused_by_name(asked, changed, far, error, words):
    with pytest.raises(error, match=words):
        decide(notes(*changed, asked=asked), far)


@pytest.mark.parametrize("asked", [None, "peer_memory", "nccl"])
def test_ranks_that_share_a_gpu_are_named(asked):
    with pytest.raises(UnsupportedError, match=r"ranks \[1, 2\] share a GPU.*torch\.cuda\.set_device"):
        decide(notes({}, {"gpu": "same"}, {"gpu": "same"}, asked=asked), [[]] * 3)


def test_a_carrier_that_there_is_not():
    with pytest.raises(KeywordError, match=r'carrier is \'infiniband\'; it must be "peer_memory", "nccl" or None'):
        TorchTransport(None, carrier="infiniband")


def test_a_torch_without_nccl_refuses_it_by_name(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UnsupportedError, match="built without NCCL"):
        TorchTransport(None, carrier="nccl")
