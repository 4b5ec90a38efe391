"""Bad input on one rank, and ranks that disagree: an error on every rank, no data sent, and a ring as good as before."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from refusals import (
    LENGTH,
    WRONG,
    WRONG_OF_VJP,
    check_disagreement,
    check_refusal,
    disagreed,
    failure,
)
from refusals import given as given_as_numpy
from shards import problem

from ringcore import PeerError, UnsupportedError, ring_attention, ring_attention_vjp
from ringcore_torch import TorchTransport

TENSORS = {
    name: row for name, row in (WRONG | WRONG_OF_VJP).items() if name != "masked array"
}  # which is NumPy's alone


@pytest.fixture(scope="module")
def ring(world):
    """One ring for all tests of this file: none of them may break it."""
    return TorchTransport(world)


@pytest.fixture
def transport(ring):
    """A ring that must have sent nothing when the test ends, and then computes a right call."""
    before = ring.messages_sent, ring.bytes_sent
    yield ring
    assert (ring.messages_sent, ring.bytes_sent) == before
    problem(ring.size, "zigzag", LENGTH, convert=torch.from_numpy, causal=True).check(ring, ring.rank)


@pytest.fixture(params=["first", "last"])
def odd(request):
    """The rank that differs: the one that all others are compared with, or another."""
    return 0 if request.param == "first" else dist.get_world_size() - 1


def given(transport, changes, different):
    return given_as_numpy(transport, changes, different, torch.from_numpy)


@pytest.mark.parametrize("row", TENSORS)
def test_bad_input_on_one_rank_is_an_error_on_every_rank(transport, odd, row):
    changes, due, said = TENSORS[row]
    attend = ring_attention if row in WRONG else ring_attention_vjp
    arguments = given(transport, changes, transport.rank == odd)
    check_refusal(failure(lambda: attend(**arguments, ring=transport)), transport, odd, due, said)


@pytest.mark.parametrize("row", disagreed(1))
def test_ranks_that_disagree_all_hear_on_what(transport, odd, row):
    changes, name = disagreed(transport.size)[row]
    if transport.size > 1:
        arguments = given(transport, changes, transport.rank == odd)
        check_disagreement(failure(lambda: ring_attention(**arguments, ring=transport)), transport, odd, name)


@pytest.mark.parametrize("everywhere", [True, False])
def test_arrays_of_numpy_are_refused_by_name(transport, odd, everywhere):
    if transport.size > 1:  # else nothing is carried
        arguments = (given_as_numpy if everywhere or transport.rank == odd else given)(transport, {}, False)
        error = failure(lambda: ring_attention(**arguments, ring=transport))
        if transport.rank == odd or everywhere:
            assert type(error) is UnsupportedError
        else:
            assert type(error) is PeerError
        assert "an array is a numpy.ndarray; a ring over torch.distributed carries tensors" in str(error)


def test_tensors_on_a_device_are_refused_by_name(ring):
    with pytest.raises(UnsupportedError, match=r"a tensor is on meta, but this ring's messages go over gloo.*x\.cpu"):
        ring.check(torch.empty(1, 1, 2, 2, device="meta"))


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.float(), lambda x: x.numpy(), lambda x: None])
def test_bad_gradient_on_one_rank_is_an_error_on_every_rank_and_may_be_made_good(ring, odd, change):
    task = problem(ring.size, "contiguous", LENGTH, convert=torch.from_numpy, heads=(4, 2), width=6)
    dout = task.shard(task.dout, ring.rank)
    _, pullback = ring_attention_vjp(*task.shards(ring.rank), ring=ring)
    error = failure(lambda: pullback(change(dout) if ring.rank == odd else dout))
    assert "dout" in str(error)
    assert (type(error) is PeerError) == (ring.rank != odd)
    for came, whole in zip(pullback(dout), task.expected()[2:], strict=True):  # the same one, done right
        np.testing.assert_array_equal(came.numpy(), task.shard(whole, ring.rank).numpy())
