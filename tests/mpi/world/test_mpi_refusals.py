"""Bad input on one rank, and ranks that disagree: an error on every rank, no data sent, and a ring as good as before."""

import re

import numpy as np
import pytest
from mpi4py import MPI
from refusals import (
    EVERY,
    LENGTH,
    WRONG,
    WRONG_OF_VJP,
    check_disagreement,
    check_refusal,
    cut,
    disagreed,
    failure,
    given,
    task_of,
)
from shards import problem

import ringcore
from ringcore import (
    DeviceError,
    DtypeError,
    KeywordError,
    LayoutError,
    ShapeError,
    UnsupportedError,
    ring_attention,
    ring_attention_vjp,
)
from ringcore_mpi import MpiTransport

SIZE = MPI.COMM_WORLD.size
DISAGREED = disagreed(SIZE)


def sent(transport):
    return transport.messages_sent, transport.bytes_sent, transport.bytes_published


@pytest.fixture(scope="module", params=[True, False], ids=["window", "messages"])
def ring(request):
    """One ring for all tests of this file: none of them may break it."""
    transport = MpiTransport(MPI.COMM_WORLD, shared=request.param)
    yield transport
    transport.close()


@pytest.fixture(scope="module")
def sound():
    """A right call, and its results in one process."""
    task = problem(SIZE, "zigzag", LENGTH, causal=True)
    return task, task.expected()


@pytest.fixture
def transport(ring, sound):
    """A ring that must have sent nothing when the test ends, and then computes a right call."""
    before = sent(ring)
    yield ring
    assert sent(ring) == before
    check_right(ring, *sound)


@pytest.fixture
def running(ring, sound):
    """A ring for pullbacks, whose forward sends what is due; it computes a right call afterwards too."""
    yield ring
    check_right(ring, *sound)


def check_right(ring, task, expected):
    for due, came in zip(expected, task.computed(ring, ring.rank), strict=True):
        np.testing.assert_array_equal(came, task.shard(due, ring.rank))


@pytest.fixture
def odd(request):
    """The rank that differs: the one that all others are compared with, or another."""
    return 0 if request.node.callspec.params["ring"] else SIZE - 1


@pytest.mark.parametrize("row", WRONG | WRONG_OF_VJP)
def test_bad_input_on_one_rank_is_an_error_on_every_rank(transport, odd, row):
    changes, due, said = (WRONG | WRONG_OF_VJP)[row]
    attend = ring_attention if row in WRONG else ring_attention_vjp
    arguments = given(transport, changes, transport.rank == odd)
    check_refusal(failure(lambda: attend(**arguments, ring=transport)), transport, odd, due, said)


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_bad_return_lse_on_one_rank_is_an_error_on_every_rank(transport, odd, value):
    arguments = given(transport, {"return_lse": value}, transport.rank == odd)
    error = failure(lambda: ring_attention(**arguments, ring=transport))
    check_refusal(error, transport, odd, KeywordError, f"return_lse is {value!r}")


def test_arrays_that_cannot_be_carried_are_an_error_on_every_rank(transport, odd):
    xp = pytest.importorskip("array_api_strict")
    if transport.size > 1:  # else nothing is carried
        arguments = given(transport, dict.fromkeys("qkv", xp.asarray), transport.rank == odd)
        error = failure(lambda: ring_attention(**arguments, ring=transport))
        check_refusal(error, transport, odd, UnsupportedError, "the MPI transport carries NumPy arrays and Torch")


def test_mixed_libraries_on_one_rank_are_an_error_on_every_rank(transport, odd):
    torch = pytest.importorskip("torch")
    arguments = given(transport, {"v": torch.asarray}, transport.rank == odd)
    error = failure(lambda: ring_attention(**arguments, ring=transport))
    check_refusal(error, transport, odd, DeviceError, "v: torch")


@pytest.mark.parametrize(
    ("function", "changes", "said"),
    [
        (ring_attention_vjp, {"q": lambda x: x.clone().requires_grad_()}, "q requires grad"),
        (ring_attention, {"v": lambda x: x.to_sparse()}, "v is a tensor of layout torch.sparse_coo"),
    ],
)
def test_tensors_that_cannot_be_honoured_are_an_error_on_every_rank(transport, odd, function, changes, said):
    torch = pytest.importorskip("torch")
    arguments = {name: torch.asarray(x) for name, x in given(transport, {}, False).items()}
    if transport.rank == odd:
        arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    check_refusal(failure(lambda: function(**arguments, ring=transport)), transport, odd, UnsupportedError, said)


@pytest.mark.parametrize("row", DISAGREED)
def test_ranks_that_disagree_all_hear_on_what(transport, odd, row):
    changes, name = DISAGREED[row]
    if transport.size > 1:
        arguments = given(transport, changes, transport.rank == odd)
        check_disagreement(failure(lambda: ring_attention(**arguments, ring=transport)), transport, odd, name)


@pytest.mark.parametrize(
    ("right", "different", "name"),
    [
        ({"wrt": ("q", "k")}, {"wrt": ("q", "v")}, "wrt"),
        ({"bias": np.zeros((1, LENGTH))}, {"bias": np.zeros((1, 1))}, "bias columns"),
        ({"bias": np.zeros((1, LENGTH)), "wrt": ("q",)}, {"bias": np.zeros((1, LENGTH)), "wrt": ("bias",)}, "wrt"),
        ({"layout": ringcore.contiguous(LENGTH, SIZE)}, {"layout": ringcore.zigzag(LENGTH, SIZE)}, "layout of q"),
        ({"key_lengths": [3, 4]}, {"key_lengths": [4, 3]}, "key_lengths"),
        ({"causal": True, "window": 3}, {"causal": True, "window": 4}, "window"),
    ],
)
def test_ranks_that_disagree_on_what_all_gave_hear_on_what(transport, odd, right, different, name):
    if transport.size > 1:
        arguments = given(transport, different if transport.rank == odd else right, True)
        check_disagreement(failure(lambda: ring_attention_vjp(**arguments, ring=transport)), transport, odd, name)


def test_ranks_that_make_different_calls_all_hear_of_it(transport, odd):
    if transport.size > 1:
        attend = ring_attention_vjp if transport.rank == odd else ring_attention
        error = failure(lambda: attend(**given(transport, {}, False), ring=transport))
        check_disagreement(error, transport, odd, "call")


@pytest.mark.parametrize(
    ("changes", "due", "said"),
    [
        ({"layout": ringcore.contiguous(LENGTH + 1, SIZE)}, LayoutError, f"deals {LENGTH + 1} positions"),
        ({"layout": ringcore.contiguous(LENGTH, SIZE + 1)}, LayoutError, f"to {SIZE + 1} ranks"),
        (
            {"bias": np.zeros((1, LENGTH - 1))},
            ShapeError,
            f"bias has {LENGTH - 1} columns, but there are {LENGTH} keys",
        ),
        ({"key_lengths": [3, LENGTH + 1]}, KeywordError, f"key_lengths is {LENGTH + 1} for batch entry 1"),
    ],
)
def test_what_is_wrong_over_all_ranks_is_an_error_on_every_rank(transport, changes, due, said):
    error = failure(lambda: ring_attention(**given(transport, changes, True), ring=transport))
    assert type(error) is due
    assert said in str(error)


def test_a_shard_that_is_too_short_is_an_error_on_every_rank(transport, odd):
    if transport.size > 1:
        empty = cut(EVERY, EVERY, slice(0))
        changes = dict.fromkeys("kv", empty) if transport.rank == odd else {}
        error = failure(lambda: ring_attention(**given(transport, changes, True), layout="striped", ring=transport))
        assert type(error) is LayoutError
        assert re.search(r"k has \d rows on rank \d, but striped over \d ranks gives that rank \d", str(error))


@pytest.mark.parametrize(
    ("name", "change", "due", "said"),
    [
        ("dout", lambda x: x[:1], ShapeError, "dout has shape (1,"),
        ("dout", lambda x: x[0], ShapeError, "dout has shape (4,"),
        ("dout", lambda x: x.astype("float32"), DtypeError, "dout holds float32"),
        ("dout", lambda x: x.tolist(), DtypeError, "dout is a list"),
        ("dout", lambda x: None, DtypeError, "dout is a NoneType"),
        ("dlse", lambda x: x[..., None], ShapeError, "dlse has shape"),
    ],
)
def test_bad_gradient_on_one_rank_is_an_error_on_every_rank_and_may_be_made_good(running, odd, name, change, due, said):
    task = task_of(running)
    rank = running.rank
    (_, lse), pullback = ring_attention_vjp(*task.shards(rank), ring=running)
    right = {"dout": task.shard(task.dout, rank), "dlse": np.zeros_like(lse)}
    before = sent(running)
    gradients = right | {name: change(right[name])} if rank == odd else right
    check_refusal(failure(lambda: pullback(**gradients)), running, odd, due, said)
    assert sent(running) == before
    for came, whole in zip(pullback(**right), task.expected()[2:], strict=True):  # the same one, done right
        np.testing.assert_array_equal(came, task.shard(whole, rank))


def test_pullback_while_others_make_another_call_is_an_error_on_every_rank(running, odd):
    if running.size == 1:
        return
    task = task_of(running)
    shards, dout = task.shards(running.rank), task.shard(task.dout, running.rank)
    _, pullback = ring_attention_vjp(*shards, ring=running)
    before = sent(running)
    mine = running.rank == odd
    error = failure(lambda: pullback(dout) if mine else ring_attention(*shards, ring=running))
    check_disagreement(error, running, odd, "call")
    assert sent(running) == before


def test_pullbacks_of_different_calls_are_told_apart(running, odd):
    """Layers of a model have the same shapes: only a name for each call tells their gradients apart."""
    if running.size == 1:
        return
    task = task_of(running)
    shards, dout = task.shards(running.rank), task.shard(task.dout, running.rank)
    pullbacks = [ring_attention_vjp(*shards, ring=running)[1] for _ in range(2)]
    before = sent(running)
    error = failure(lambda: pullbacks[running.rank == odd](dout))
    check_disagreement(error, running, odd, "the call that this pullback belongs to")
    assert sent(running) == before


def test_what_concerns_one_rank_alone_may_differ(running, odd):
    task = task_of(running, causal=True)
    rank, out = running.rank, task.shard(task.expected()[0], running.rank)
    shards = task.shards(rank)
    alone = [
        {"axes": "bshd"},
        {"return_lse": True},
        {"kernels": "reference"},
        {"bias": np.zeros((1, LENGTH), "float32")},
    ]
    for changes in alone:
        mine = changes if rank == odd else {}
        if "bias" in changes:  # all have one, each of a dtype of its own
            mine = {"bias": changes["bias"] if rank == odd else np.zeros((4, 1, LENGTH))}
        arrays = [x.swapaxes(1, 2) for x in shards] if "axes" in mine else shards
        came = ring_attention(*arrays, ring=running, causal=True, **mine)
        came = came[0] if "return_lse" in mine else came.swapaxes(1, 2) if "axes" in mine else came
        np.testing.assert_allclose(came, out, rtol=0, atol=1e-14)


@pytest.mark.parametrize("odd", [0, SIZE - 1])
def test_branches_of_dilated_attention_are_agreed_on(transport, odd):
    q, k, v = task_of(transport).shards(transport.rank)

    def call(branches, other):
        lengths, rates = other if transport.rank == odd else branches
        return ringcore.dilated_attention(q, k, v, ring=transport, segment_lengths=lengths, dilation_rates=rates)

    before = sent(transport)
    error = failure(lambda: call(([8], [2]), ([8], [0])))
    if SIZE > 1:
        check_refusal(error, transport, odd, KeywordError, "dilation_rates is [0]")
        check_disagreement(failure(lambda: call(([8], [2]), ([8], [4]))), transport, odd, "dilation_rates")
    assert sent(transport) == before
