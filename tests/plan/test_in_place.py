"""Published blocks read in place: what is fetched is what is read, here or by those that it is sent on to."""

from ringcore.exchange import InPlace
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
