"""Grids of heads and ring, double rings and rings both ways: what crosses between groups, and what is refused."""

import gc
import weakref

import numpy as np
import pytest
from mpi4py import MPI

import ringcore
from ringcore import AgreementError, DoubleRing, Grid, KeywordError, PeerError, ShapeError, UnsupportedError
from ringcore_mpi import MpiTransport

WORLD = MPI.COMM_WORLD
BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH, VALUES = 2, 8, 4, 24, 6, 5
ROW = BATCH * KEY_HEADS * (WIDTH + VALUES)  # numbers of k and v for one position


class Counting:
    """A transport that counts bytes which leave for ranks that ``far`` names."""

    def __init__(self, host, far):
        self.host, self.far, self.bytes = host, far, 0
        self.rank, self.size, self.node, self.sharers = host.rank, host.size, host.node, host.sharers

    def check(self, *arrays):
        self.host.check(*arrays)

    def gather(self, note):
        return self.host.gather(note)

    def abort(self, error):
        self.host.abort(error)

    def exchange(self, kind, sends, receives):
        self.bytes += sum(x.nbytes for move, blocks in sends for x in blocks if self.far(move.peer))
        return self.host.exchange(kind, sends, receives)


def arrays(dtype="float64", length=LENGTH):
    rng = np.random.default_rng(5)
    sizes = (HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, VALUES), (HEADS, VALUES)
    return [rng.standard_normal((BATCH, heads, length, width)).astype(dtype) for heads, width in sizes]


def mine(layout="contiguous", dtype="float64"):
    return [np.ascontiguousarray(ringcore.shard(x, layout, WORLD.rank, WORLD.size)) for x in arrays(dtype)]


def grid_comms(heads):
    """The two groups of this rank, in a grid with so many ranks in each group."""
    rank = WORLD.rank
    return WORLD.Split(rank % heads, rank), WORLD.Split(rank // heads, rank)


def check(ring, layout, **keywords):
    """Out and gradients are those of one process."""
    whole, alone = arrays(), {name: x for name, x in keywords.items() if name != "schedule"}
    (due, _), of_due = ringcore.ring_attention_vjp(*whole[:3], kernels="reference", **alone)
    q, k, v, dout = mine(layout)
    (out, _), pullback = ringcore.ring_attention_vjp(q, k, v, ring=ring, layout=layout, **keywords)
    for x, expected in zip((out, *pullback(dout)), (due, *of_due(whole[3])), strict=True):
        np.testing.assert_allclose(x, ringcore.shard(expected, layout, WORLD.rank, WORLD.size), atol=1e-12)


def of_heads(q_positions, k_positions):
    """Each head sees the keys of one remainder alone, and the first one."""
    remainders = np.arange(HEADS)[:, None, None] % 3
    return ((q_positions - k_positions) % 3 == remainders) | (k_positions == 0)


def total(number):
    return WORLD.allreduce(number)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_a_grid_is_attention_and_bytes_between_groups_are_as_said(heads, layout):
    if WORLD.size % heads or KEY_HEADS % heads:
        return
    between, inside = (MpiTransport(comm, shared=False) for comm in grid_comms(heads))
    counted = Counting(between, lambda peer: True)
    grid = Grid(counted, inside)
    groups = WORLD.size // heads
    q, k, v, dout = mine(layout)
    (_, _), pullback = ringcore.ring_attention_vjp(q, k, v, ring=grid, layout=layout)
    assert total(counted.bytes) == (groups - 1) * LENGTH * ROW * 8
    pullback(dout)
    # Again k and v, and dk and dv on their way home.
    assert total(counted.bytes) == 3 * (groups - 1) * LENGTH * ROW * 8
    for keywords in ({"causal": True}, {"window": (5, 1), "softcap": 2.0}, {"mask": of_heads}):
        check(grid, layout, **keywords)
    for transport in (between, inside):
        transport.close()


def test_two_communicators_are_a_grid():
    heads = 2 if WORLD.size % 2 == 0 else 1
    ring = grid_comms(heads)
    documents = np.arange(LENGTH) // 5
    check(ring, "zigzag", causal=True, documents=documents)
    words = ringcore.explain(*mine()[:3], ring=ring).ring
    assert f"grid, rank {WORLD.rank} of {WORLD.size // heads} groups of {heads}" in words


@pytest.mark.parametrize("inner", [1, 2, 3, 4])
def test_double_rings_cross_as_little_as_is_said(inner):
    if WORLD.size % inner:
        return
    host = MpiTransport(WORLD, shared=False)
    counted = Counting(host, lambda peer: peer // inner != WORLD.rank // inner)
    outer = WORLD.size // inner
    q, k, v, dout = mine()
    (_, _), pullback = ringcore.ring_attention_vjp(q, k, v, ring=counted, schedule=DoubleRing(inner))
    assert total(counted.bytes) == (outer - 1) * LENGTH * ROW * 8
    pullback(dout)
    # dk and dv follow from the first guest on; in inner rings of one that is in the next one.
    carried = 0 if outer == 1 else outer - (inner == 1)
    assert total(counted.bytes) == (2 * (outer - 1) + carried) * LENGTH * ROW * 8
    check(host, "zigzag", schedule=DoubleRing(inner), causal=True)
    host.close()


@pytest.mark.parametrize("nodes", [1, 2])
def test_machines_make_a_double_ring(nodes):
    if WORLD.size % nodes:
        return
    host = MpiTransport(WORLD, node=WORLD.rank // (WORLD.size // nodes))
    check(host, "striped", schedule="double", causal=True)
    host.close()


def test_machines_of_unlike_ranks_make_none():
    if WORLD.size < 3:
        return
    host = MpiTransport(WORLD, node=min(1, WORLD.rank))
    with pytest.raises(KeywordError, match=r"the ranks are on machines \[0, 1, 1"):
        ringcore.ring_attention(*mine()[:3], ring=host, schedule="double")
    check(host, "contiguous")  # the ring is as good as before
    host.close()


def test_both_ways_each_side_gets_half():
    host = MpiTransport(WORLD, shared=False)
    after = Counting(host, lambda peer: peer == (WORLD.rank + 1) % WORLD.size)
    q, k, v, _ = mine()
    ringcore.ring_attention(q, k, v, ring=after, schedule="bidirectional")
    halves = 2 if WORLD.size == 2 else 1  # of two ranks both sides are one
    assert total(after.bytes) == halves * (WORLD.size - 1) * LENGTH * ROW * 8 // 2
    check(host, "contiguous", schedule="bidirectional", causal=True)
    host.close()


def refused(error, words, ring, **keywords):
    with pytest.raises(error, match=words):
        ringcore.ring_attention(*mine()[:3], ring=ring, **keywords)


def test_what_is_no_grid_is_refused_on_every_rank():
    rank, size = WORLD.rank, WORLD.size
    if size < 2:
        return
    both = WORLD.Split(0, rank), WORLD.Split(0, rank)
    refused(KeywordError, "are not the row and the column of one grid", both)
    if size == 4:
        crossed = WORLD.Split(rank % 2, -rank if rank % 2 else rank), WORLD.Split(rank // 2, rank)
        refused(KeywordError, "are not the row and the column of one grid", crossed)
        slanted = WORLD.Split((rank % 2) ^ (rank // 2), rank), WORLD.Split(rank // 2, rank)
        refused(KeywordError, "are not the row and the column of one grid", slanted)
    refused(KeywordError, "ring holds 3 groups", (*both, WORLD))


@pytest.mark.parametrize("odd", [0, 3])
def test_groups_in_the_other_order_on_one_rank_are_refused(odd):
    if WORLD.size != 4:
        pytest.skip("2 by 2 is the grid that has both orders")
    between, inside = grid_comms(2)
    for ring in ((between, inside), (inside, between)):
        ringcore.ring_attention(*mine()[:3], ring=ring)
    turned = (inside, between) if WORLD.rank == odd else (between, inside)
    with pytest.raises((KeywordError, PeerError), match="ring is two groups here"):
        ringcore.ring_attention(*mine()[:3], ring=turned)


def test_a_ring_on_one_rank_where_others_have_a_grid_is_refused():
    if WORLD.size != 2:
        pytest.skip("of more ranks some share no group with that one, and hear nothing before the deadline")
    between, inside = grid_comms(2)
    ringcore.ring_attention(*mine()[:3], ring=(between, inside))
    ringcore.ring_attention(*mine()[:3], ring=inside)
    error, words = (
        (AgreementError, "disagree on ring") if WORLD.rank == 0 else ((KeywordError, PeerError), "two groups")
    )
    with pytest.raises(error, match=words):
        ringcore.ring_attention(*mine()[:3], ring=inside if WORLD.rank == 0 else (between, inside))


def test_what_a_grid_cannot_deal_is_refused_on_every_rank():
    heads = 2 if WORLD.size % 2 == 0 else 1
    ring = grid_comms(heads)
    rows = mine()[0].shape[2]
    refused(UnsupportedError, "bias is an array", ring, bias=np.zeros((rows, LENGTH)))
    refused(UnsupportedError, "mask is an array", ring, mask=np.ones((rows, LENGTH), bool))
    refused(UnsupportedError, "schedule is 'bidirectional', but in a grid", ring, schedule="bidirectional")
    refused(
        KeywordError, r"schedule is 'spiral'; it must be one of ring, double, bidirectional", ring, schedule="spiral"
    )
    with pytest.raises(UnsupportedError, match="dilated_attention deals its heads"):
        ringcore.dilated_attention(*mine()[:3], ring=ring, segment_lengths=[8], dilation_rates=[1])
    with pytest.raises(KeywordError, match="ring is a grid"):
        ringcore.decode_attention(*mine()[:3], ring=ring)
    check(ring, "contiguous", causal=True)
    # One rank alone is wrong: all others hear of it, whatever row and column they are in.
    q, k, v, _ = mine()
    wrong = {"scale": -1.0 if WORLD.rank == WORLD.size - 1 else None, "causal": "yes" if WORLD.rank == 0 else True}
    with pytest.raises(KeywordError if WORLD.rank == 0 else PeerError):
        ringcore.ring_attention(q, k, v, ring=ring, causal=wrong["causal"])
    check(ring, "striped")


def test_what_ranks_of_a_grid_give_may_differ_only_where_it_is_not_traded():
    heads = 2 if WORLD.size % 2 == 0 else 1
    ring, last = grid_comms(heads), WORLD.rank == WORLD.size - 1
    q, k, v, dout = mine()
    whole = arrays()
    # One rank has a gradient of lse: for the others it is 0.
    (_, lse), pullback = ringcore.ring_attention_vjp(q, k, v, ring=ring)
    rows = ringcore.contiguous(LENGTH, WORLD.size)
    dlse = np.ones(lse.shape) if last else None
    due_dlse = np.zeros(whole[0].shape[:3])
    due_dlse[:, :, rows.positions(WORLD.size - 1)] = 1.0
    _, of_due = ringcore.ring_attention_vjp(*whole[:3], kernels="reference")
    for x, due in zip(pullback(dout, dlse), of_due(whole[3], due_dlse), strict=True):
        np.testing.assert_allclose(x, ringcore.shard(due, "contiguous", WORLD.rank, WORLD.size), atol=1e-12)
    # Partials are traded: all ranks give one, or none.
    first = ringcore.ring_attention(q, k, v, ring=ring, mask=lambda i, j: j % 2 == 0, return_partial=True)
    odd = {"mask": lambda i, j: j % 2 == 1}
    out = ringcore.ring_attention(q, k, v, ring=ring, partial=first, **odd)
    due = ringcore.ring_attention(*whole[:3], kernels="reference")
    np.testing.assert_allclose(out, ringcore.shard(due, "contiguous", WORLD.rank, WORLD.size), atol=1e-12)
    if WORLD.size > 1:
        with pytest.raises(AgreementError, match="whether partial is given"):
            ringcore.ring_attention(q, k, v, ring=ring, partial=first if last else None, **odd)
        with pytest.raises(AgreementError, match="return_partial"):
            ringcore.ring_attention(q, k, v, ring=ring, return_partial=last)
    check(ring, "contiguous")


def test_a_grid_is_made_once_and_goes_with_its_ring():
    between, inside = grid_comms(1)
    ring, heads = MpiTransport(between), MpiTransport(inside)
    grid = ringcore.grid_of(ring, heads)
    assert ringcore.grid_of(ring, heads) is grid
    assert ringcore.find_ring(grid) is grid
    kept = weakref.ref(grid)
    ring.close()
    heads.close()
    del ring, heads, grid
    gc.collect()
    assert kept() is None


def test_heads_that_the_group_does_not_divide():
    if WORLD.size == 1:
        return
    ring = grid_comms(WORLD.size)  # one group of all
    q, k, v, _ = mine()
    if KEY_HEADS % WORLD.size:
        refused(ShapeError, f"k and v have 4 heads, which the {WORLD.size} ranks", ring)
    else:
        check(ring, "contiguous")
    with pytest.raises(ShapeError, match="k and v have 1 heads, which"):
        ringcore.ring_attention(q, k[:, :1], v[:, :1], ring=ring)


def test_inner_rings_that_do_not_divide_the_ranks():
    refused(
        KeywordError,
        f"inner rings of 5 ranks, which do not divide the {WORLD.size} ranks",
        WORLD,
        schedule=DoubleRing(5),
    )
    refused(KeywordError, "ringcore.DoubleRing", WORLD, schedule=DoubleRing(0))
