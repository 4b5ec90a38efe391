"""Published blocks read in place: what is fetched is what is read, here or by those that it is sent on to."""

import ringcore
from ringcore.exchange import InPlace, places_at_home
from ringcore.layout import zigzag
from ringcore.schedule import ring_plans
from ringcore.tiling import Visibility
from ringcore.values import Move

SIZE = 4


class Reader:
    """A transport among ranks of which some reach each other; notes what is fetched."""

    rank, size, node, sharers = 1, SIZE, 0, 1

    def __init__(self, reached):
        self.reached, self.fetched = reached, []

    def reaches(self, reader, owner):
        return {reader, owner} in self.reached

    def fetch(self, owner, rows, seen=None):
        self.fetched.append((owner, rows, seen))
        return ()

    def exchange(self, kind, sends, receives):
        return self


def fetched(reached):
    layout = zigzag(24, SIZE)
    visibility = Visibility(True, (None, None), (0,), (24,), 1, 1)
    plan = ring_plans(layout, layout, visibility)[1]
    reader = Reader(reached)
    InPlace(reader, plan).exchange("visiting", [], [(Move(0, 0), ())])
    return reader.fetched, plan


def test_rows_that_nobody_here_sees_need_not_be_fetched():
    found, plan = fetched([{1, 0}, {2, 0}])
    assert found == [(0, None, plan.seen(0))]
    assert plan.seen(0) == slice(0, 3)


def test_a_block_that_goes_on_as_a_message_is_fetched_whole():
    found, _ = fetched([{1, 0}])
    assert found == [(0, None, None)]


def test_what_comes_home_from_several_peers_lies_side_by_side():
    layout = ringcore.contiguous(24, SIZE)
    visibility = Visibility(False, (7, 9), (0,), (24,), 1, 1)
    plans = ring_plans(layout, layout, visibility)
    carried = {plan.rank: {move: (len(move.rows),) for move in plan.home} for plan in plans}
    assert max(map(len, carried.values())) > 1
    places, last, largest = places_at_home(carried, sum, start=5)
    for owner, moves in carried.items():
        taken = [
            byte
            for move, (size,) in moves.items()
            for byte in range(places[owner, move.peer], places[owner, move.peer] + size)
        ]
        assert len(set(taken)) == len(taken)
        assert min(taken) == 5
        assert max(taken) < last
    assert largest == max(size for moves in carried.values() for (size,) in moves.values())
    assert places_at_home({0: {}, 1: {}}, sum) == ({}, 0, 0)
