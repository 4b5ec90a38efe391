"""Single blocks between two ranks: rows and layouts that whole calls do not ask for."""

import cupy
import numpy as np
import pytest
from happens_before import traced
from thread_host import ThreadHost, in_threads

from ringcore import Move, Spec
from ringcore_cupy import CupyTransport

SHAPE = 2, 3, 8, 4  # [B, H, S, D]
LAID = {
    "heads first": lambda x: x,
    "rows first": lambda x: cupy.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "with gaps": lambda x: cupy.ascontiguousarray(cupy.concatenate([x, x], axis=-1))[..., :4],
    "one head": lambda x: x[:, :1],
    "no rows": lambda x: x[:, :, :0],
}


def numbers(rank):
    return np.random.default_rng(rank).standard_normal(SHAPE)


def spec_of(x):
    return Spec(tuple(x.shape), x, x.dtype)


def between(world, rank, carrier, way):
    """Each of the two publishes a block and sends the other one's accumulators home."""
    ring = CupyTransport(ThreadHost(world, rank, device_buffers=True), carrier=carrier)
    x, peer = cupy.asarray(numbers(rank)), 1 - rank
    laid = LAID[way](x), LAID["rows first"](x)
    specs = tuple(map(spec_of, laid))
    carried = {owner: {Move(1 - owner, owner): specs} for owner in (0, 1)}
    ring.publish((x,), {0: (spec_of(x),), 1: (spec_of(x),)}, carried)
    parts = []
    if carrier == "ipc":
        for rows, seen in ((None, None), (slice(1, 6), None), (slice(1, 6), slice(1, 3)), (slice(0, 8, 3), None)):
            (part,) = ring.fetch(peer, rows, seen)
            ring.exchange("visiting", [], []).wait()
            whole = numbers(peer)[:, :, rows or slice(None)]
            parts.append((part[:, :, seen or slice(None)].get(), whole[:, :, seen or slice(None)]))
    coming = ring.exchange("carried", [], [(Move(peer, rank), specs)])
    leaving = ring.exchange("carried", [(Move(peer, peer), laid)], [])
    (arrived,) = coming.wait().values()
    found = [y.get() for y in arrived]
    leaving.wait()
    ring.retire()
    due = [LAID[way](cupy.asarray(numbers(peer))).get(), numbers(peer)]
    ring.close()
    return [*parts, *zip(found, due, strict=True)]


@pytest.mark.parametrize("way", LAID)
@pytest.mark.parametrize("carrier", ["ipc", "nccl", "mpi", "host"])
def test_blocks_arrive_as_they_were(monkeypatch, carrier, way):
    with traced(monkeypatch):
        for pairs in in_threads(2, between, carrier, way):
            for came, due in pairs:
                np.testing.assert_array_equal(came, due)
