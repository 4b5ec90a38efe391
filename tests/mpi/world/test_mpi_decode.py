"""Decoding over a cache on all ranks: right, the same bits on each, and what differs is refused on all."""

import numpy as np
import pytest
from decoding import CALLS, check, problem
from mpi4py import MPI
from refusals import check_disagreement, failure

import ringcore
from ringcore_mpi import MpiTransport

SIZE = MPI.COMM_WORLD.size


@pytest.fixture(scope="module", params=[True, False], ids=["window", "messages"])
def ring(request):
    transport = MpiTransport(MPI.COMM_WORLD, shared=request.param)
    yield transport
    transport.close()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("name", CALLS)
def test_decoding(ring, layout, name, rows):
    bits = check(ring, layout, name, rows)
    assert len(set(MPI.COMM_WORLD.allgather(bits))) == 1


def test_only_partials_travel(ring):
    q, k, v = problem(1)
    mine = [np.ascontiguousarray(ringcore.shard(x, "striped", ring.rank, ring.size)) for x in (k, v)]
    before = ring.bytes_sent + ring.bytes_published
    ringcore.decode_attention(q, *mine, ring=ring, layout="striped")
    spent = ring.bytes_sent + ring.bytes_published - before
    partial = q.shape[0] * q.shape[1] * (v.shape[3] + 2) * 8
    assert spent <= max(1, ring.size - 1) * partial


def test_one_reduction_for_each_token(ring):
    q, k, v = problem(1)
    mine = [np.ascontiguousarray(ringcore.shard(x, "striped", ring.rank, ring.size)) for x in (k, v)]
    sent, reductions = ring.messages_sent, ring.reductions
    for length in range(1, 6):
        ringcore.decode_attention(q, *mine, ring=ring, layout="striped", key_lengths=[length] * 2)
    assert ring.messages_sent == sent  # no block
    assert ring.reductions - reductions == (5 if ring.size > 1 else 0)


def test_a_reduction_is_in_the_order_of_ranks(ring):
    """By a function that tells who came first: the digits of all ranks, one after the other."""
    found = ring.reduce(np.array([ring.rank + 1.0, 10.0]), lambda a, b: np.array([a[0] * b[1] + b[0], a[1] * b[1]]))
    assert found.tolist() == [int("".join(str(rank + 1) for rank in range(ring.size))), 10.0**ring.size]
    assert ring.reduce([1.0], None) is None


@pytest.mark.parametrize("odd", [0, SIZE - 1])
def test_other_numbers_of_queries_are_refused(ring, odd):
    if SIZE == 1:
        pytest.skip("there is nobody to differ from")
    q, k, v = problem(3)
    if ring.rank == odd:
        q = q[:, :, :2]
    mine = [np.ascontiguousarray(ringcore.shard(x, "striped", ring.rank, ring.size)) for x in (k, v)]
    error = failure(lambda: ringcore.decode_attention(q, *mine, ring=ring, layout="striped"))
    check_disagreement(error, ring, odd, "rows of q, which every rank must have")
    check(ring, "striped", "growing", 1)


@pytest.mark.parametrize("odd", [0, SIZE - 1])
@pytest.mark.parametrize(("name", "others", "own"), [
    ("key_lengths", [3, 3], [3, 2]), ("query_offset", None, [0, 0]), ("query_offset", 3, 2),
], ids=str)  # fmt: skip
def test_what_ranks_say_of_the_cache_is_agreed_on_by_name(ring, odd, name, others, own):
    if SIZE == 1:
        pytest.skip("there is nobody to differ from")
    q, k, v = problem(1)
    mine = [np.ascontiguousarray(ringcore.shard(x, "striped", ring.rank, ring.size)) for x in (k, v)]
    given = {name: own if ring.rank == odd else others}
    error = failure(lambda: ringcore.decode_attention(q, *mine, ring=ring, layout="striped", **given))
    check_disagreement(error, ring, odd, name)
    check(ring, "striped", "growing", 1)
