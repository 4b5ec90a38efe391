"""Blocks that a late peer has still to take: nothing is reused before it did, and order is kept."""

import time

import pytest
import torch
import torch.distributed as dist

from ringcore import Move, Spec
from ringcore_torch import TorchTransport


@pytest.fixture(scope="module")
def transport(world):
    if dist.get_world_size() == 1:
        pytest.skip("needs 2 ranks")
    return TorchTransport(world)


def spec(x):
    return Spec(tuple(x.shape), x, x.dtype)


def test_a_block_may_be_overwritten_once_it_was_waited_for(transport):
    block = torch.full((1, 1, 4_000_000, 2), 7.0)  # more than any socket holds
    if transport.rank == 0:
        sends = [(Move(peer, 0), (block,)) for peer in range(1, transport.size)]
        transport.exchange("visiting", sends, []).wait()
        block.fill_(-1)
    else:
        time.sleep(0.2 * transport.rank)  # late
        came = transport.exchange("visiting", [], [(Move(0, 0), [spec(block)])]).wait()
        assert (came[Move(0, 0)][0] == 7).all()
    dist.barrier()


def test_blocks_move_while_nobody_waits_for_them(transport):
    block = torch.full((1, 1, 4_000_000, 2), 7.0)
    rank, size = transport.rank, transport.size
    left, right = (rank - 1) % size, (rank + 1) % size
    pending = transport.exchange("visiting", [(Move(right, rank), (block,))], [(Move(left, left), [spec(block)])])
    until = time.monotonic() + 20
    while not (pending._arrived[Move(left, left)][0][0, 0, -1] == 7).all():
        assert time.monotonic() < until, "the last element did not arrive"
        time.sleep(0.01)
    pending.wait()
    dist.barrier()


def test_a_copy_that_is_sent_lives_until_it_has_left(transport):
    wide = torch.arange(6_000_000.0).reshape(1, 1, -1, 3)
    if transport.rank == 0:
        pending = transport.exchange("visiting", [(Move(1, 0), (wide[..., :2],))], [])
        for _ in range(20):  # what is free is used again
            torch.full((1, 1, 2_000_000, 2), -1.0)
        pending.wait()
    elif transport.rank == 1:
        time.sleep(0.3)
        due = wide[..., :2]
        came = transport.exchange("visiting", [], [(Move(0, 0), [spec(due)])]).wait()[Move(0, 0)][0]
        assert torch.equal(came, due)
    dist.barrier()


@pytest.mark.parametrize("carried", [1, 2])
def test_blocks_under_way_at_once_are_told_apart(transport, carried):
    """By kind, owner, rows and place: in an order of listing that differs between sender and receiver."""

    def blocks(owner, kind, start):
        count = 2 if kind == "visiting" else carried
        return tuple(
            torch.full((1, 1, 3, 2), 1000.0 * owner + 100 * (kind == "carried") + 10 * start + i) for i in range(count)
        )

    moves = [(owner, range(start, start + 3)) for owner in range(transport.size) for start in (0, 3)]
    if transport.rank == 0:
        pending = []
        for kind in ("carried", "visiting"):
            sends = [(Move(1, owner, rows), blocks(owner, kind, rows.start)) for owner, rows in moves]
            pending.append(transport.exchange(kind, sends, []))
        for one in pending:
            one.wait()
    elif transport.rank == 1:
        pending = {}
        for kind in ("visiting", "carried"):
            due = blocks(0, kind, 0)
            receives = [(Move(0, owner, rows), [spec(x) for x in due]) for owner, rows in reversed(moves)]
            pending[kind] = transport.exchange(kind, [], receives)
        for kind, one in pending.items():
            for move, came in one.wait().items():
                for x, y in zip(came, blocks(move.block, kind, move.rows.start), strict=True):
                    assert torch.equal(x, y)
    dist.barrier()


def test_what_left_is_counted(transport):
    before = transport.messages_sent, transport.bytes_sent
    x, empty = torch.ones(1, 1, 5, 2), torch.ones(1, 1, 0, 2)
    rank, size = transport.rank, transport.size
    left, right = (rank - 1) % size, (rank + 1) % size
    transport.exchange(
        "carried", [(Move(right, rank), (x, empty))], [(Move(left, left), [spec(x), spec(empty)])]
    ).wait()
    assert (transport.messages_sent, transport.bytes_sent) == (before[0] + 1, before[1] + 40)
