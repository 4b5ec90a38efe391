"""Messages between streams, in strict channels without a GPU: no plan makes ranks wait for each other."""

import pytest
import torch
from deals import DEALS, SIGHTS, calls, deals, layouts, visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from later import decode_plans
from rendezvous import End, Wires, check_strictly

import ringcore
from ringcore import Move, Spec, TransportError
from ringcore.routes import both_ways_plans, double_ring_plans
from ringcore.schedule import halo_plans, query_plans, ring_plans, rotation
from ringcore.values import Tile
from ringcore_torch.stream_messages import StreamMessages

SIZES = range(1, 7)
SOMETHING = (Tile(*[slice(0, 1)] * 5, (range(1),), (range(1),)),)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DEALS)
def test_no_layout_makes_ranks_wait_for_each_other(name, size):
    for sight in SIGHTS.values():
        row = {"queries": 13, "keys": 13, **sight}
        q_layout, k_layout = deals(name, row.pop("queries"), row["keys"], size)
        for carries in (False, True):
            check_strictly(ring_plans(q_layout, k_layout, visibility(**row)), k_layout.lengths, carries)


@given(calls())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_call_makes_ranks_wait_for_each_other(call):
    check_strictly(ring_plans(*call), call[1].lengths, True)


@given(st.data())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_no_visits_make_ranks_wait_for_each_other(data):
    """Any rank may have nothing to compute at any step, and any block may end its way anywhere."""
    size = data.draw(st.integers(2, 7))
    pairs = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))
    seen = data.draw(st.sets(pairs)) if data.draw(st.booleans()) else None
    hops = [data.draw(st.integers(0, size - 1)) for _ in range(size)]

    def tiles(resident, visitor):
        if seen is not None:
            return SOMETHING if (resident, visitor) in seen else ()
        return SOMETHING if (resident - visitor) % size <= hops[visitor] else ()

    lengths = [data.draw(st.integers(0, 3)) for _ in range(size)]
    check_strictly(rotation(size, tiles), lengths, True)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_later_plans_make_no_ranks_wait_for_each_other(data):
    hosts, inside = data.draw(st.sampled_from([(1, 3), (2, 2), (2, 3), (3, 2), (5, 1)]))
    size, length = hosts * inside, data.draw(st.integers(0, 12))
    layout = data.draw(layouts(length, size))
    side = st.none() | st.integers(0, 5)
    seen = visibility(keys=length, causal=data.draw(st.booleans()), window=(data.draw(side), data.draw(side)))
    for plans in (
        halo_plans(layout, layout, seen),
        query_plans(layout, layout, seen),
        double_ring_plans(layout, layout, seen, layout.size // hosts),
        both_ways_plans(layout, layout, seen),
    ):
        check_strictly(plans, layout.lengths, True)


@pytest.mark.parametrize("size", SIZES)
def test_partials_of_one_query_go_to_all_ranks_at_once(size):
    def everybodys(plans, works, owner):
        return torch.cat([work.rows_of(work.plan.rank) for work in works], dim=3)

    plans = decode_plans(3, ringcore.contiguous(20, size), visibility(keys=20, queries=3))
    check_strictly(plans, [3] * size, True, everybodys)


def test_blocks_without_rows_send_nothing():
    keys = ringcore.from_lengths([0, 5, 0])
    plans = ring_plans(ringcore.contiguous(6, 3), keys, visibility(keys=5))
    # The one block visits both others, and its accumulators make one hop and go home, in each of two calls.
    assert check_strictly(plans, keys.lengths, True) == 2 * (2 + 2)


@pytest.fixture
def ends():
    """(messages of rank 0 of 3, their channels, what their stream waits for)."""
    awaited = []
    channels = Wires(3), Wires(3)
    return StreamMessages(0, *(End(wires, 0, awaited) for wires in channels), check=lambda: None), channels, awaited


BLOCK = torch.ones(1, 1, 4, 2)
SPEC = (Spec((1, 1, 4, 2), BLOCK, BLOCK.dtype),)


def test_accumulators_that_no_others_follow_leave_before_anything_later_is_waited_for(ends):
    messages, (visiting, carried), _ = ends
    earlier = messages.exchange("visiting", [], [(Move(2, 2), SPEC)])
    messages.exchange("carried", [(Move(1, 2), (BLOCK,))], [])
    earlier.wait()
    assert not carried.queues[0]
    later = messages.exchange("visiting", [], [(Move(2, 1), SPEC)])
    assert not carried.queues[0]
    later.wait()
    assert [[peer for peer, _ in group.sends] for group in carried.queues[0]] == [[1]]
    assert len(visiting.queues[0]) == 2


def test_what_went_home_may_be_overwritten_after_the_call(ends):
    messages, (_, carried), awaited = ends
    messages.exchange("carried", [(Move(2, 2), (BLOCK,))], []).wait()
    assert not awaited
    assert not carried.queues[0]
    messages.retire()
    assert awaited == [carried.queues[0][0].done]
    assert not awaited[0].passed


def test_what_arrives_is_behind_the_mark_that_is_waited_for(ends):
    messages, (visiting, _), awaited = ends
    came = messages.exchange("visiting", [(Move(1, 0), (BLOCK,))], [(Move(2, 2), SPEC)]).wait()
    assert awaited == [visiting.queues[0][0].done]
    assert came[Move(2, 2)][0] is visiting.queues[0][0].receives[0][1]


def test_gaps_of_tensors_are_not_sent(ends):
    messages, (visiting, _), _ = ends
    messages.exchange("visiting", [(Move(1, 0), (torch.arange(12.0).reshape(1, 1, 4, 3)[..., :2],))], [])
    ((_, sent),) = visiting.queues[0][0].sends
    assert sent.is_contiguous()
    assert torch.equal(sent[0, 0, :, 0], torch.tensor([0.0, 3, 6, 9]))


def test_a_ring_that_ended_starts_nothing():
    def ended():
        raise TransportError("this ring ended")

    messages = StreamMessages(0, *(End(Wires(2), 0, []) for _ in range(2)), check=ended)
    for call in (lambda: messages.exchange("visiting", [(Move(1, 0), (BLOCK,))], []), messages.retire):
        with pytest.raises(TransportError, match="this ring ended"):
            call()
