"""Whole calls over gloo against the ring in one process."""

import time

import pytest
import torch
import torch.distributed as dist
from shards import problem, same
from torch.distributed.device_mesh import init_device_mesh

import ringcore
from ringcore_torch import TorchTransport, adapt


def task_of(group, layout="contiguous", dtype="float64", **keywords):
    def convert(x):
        return torch.from_numpy(x).to(getattr(torch, dtype))

    return problem(dist.get_world_size(group), layout, convert=convert, **keywords)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ring_of_any_size_is_bit_for_bit_the_ring_in_one_process(group, size, layout):
    if ring := group(size):
        task_of(ring, layout, causal=True).check(ring, dist.get_rank())


@pytest.mark.parametrize("keywords", [{}, {"window": (9, 4)}, {"softcap": 5.0}, {"key_lengths": (53, 17)}])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_keywords_and_dtypes_reach_every_rank(world, dtype, keywords):
    task_of(world, "zigzag", dtype, **keywords).check(world, dist.get_rank())


def test_ranks_of_the_ring_are_those_of_its_group(group):
    ring = group(dist.get_world_size(), order=-1)
    rank = dist.get_world_size() - 1 - dist.get_rank()
    assert adapt(ring).rank == dist.get_rank(ring) == rank
    task_of(ring, causal=True).check(ring, rank)


@pytest.mark.parametrize("part", ["even and odd", "two rings at once"])
def test_ring_of_a_part_of_the_world(world, part):
    ranks = range(dist.get_world_size())
    parts = [ranks[::2], ranks[1::2]] if part == "even and odd" else [ranks[:2], ranks[2:]]
    made = [dist.new_group(ranks) for ranks in parts if len(ranks)]
    (ring,) = [one for one in made if one != dist.GroupMember.NON_GROUP_MEMBER]
    task_of(ring, "zigzag", causal=True).check(ring, dist.get_rank(ring))
    dist.destroy_process_group(ring)


def test_ring_over_one_dimension_of_a_mesh(world):
    size, rank = dist.get_world_size(), dist.get_rank()
    line = init_device_mesh("cpu", (size,))
    task_of(line.get_group(), causal=True).check(line, rank)
    grid = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "sequence"))
    task_of(grid["sequence"].get_group(), causal=True).check(grid["sequence"], rank)
    task_of(grid["data"].get_group(), causal=True).check(grid["data"], 0)


@pytest.mark.parametrize("lengths", [(20, 0, 1, 9), (0, 0, 0, 7), (1, 1, 1, 1), (0, 5, 0, 0)])
def test_uneven_and_empty_shards(world, lengths):
    lengths = (lengths * 2)[-dist.get_world_size() :]
    layout = ringcore.from_lengths(lengths)
    task_of(world, layout, length=sum(lengths), causal=True).check(world, dist.get_rank())


def test_tensors_with_gaps_between_elements(world):
    rank = dist.get_rank()
    task = task_of(world, causal=True)
    due = task.shard(task.expected()[0], rank)
    turned = (x.transpose(1, 2) for x in task.shards(rank))
    came = ringcore.ring_attention(*turned, ring=world, causal=True, axes="bshd")
    same("out", due, came.transpose(1, 2))
    gapped = (x.repeat_interleave(2, 3)[..., ::2] for x in task.shards(rank))
    same("out", due, ringcore.ring_attention(*gapped, ring=world, causal=True))


def test_every_way_to_name_a_ring_gives_the_same_bits(world):
    rank = dist.get_rank()
    task = task_of(world, "zigzag", causal=True)
    for ring in (world, adapt(world), TorchTransport(world, node=rank % 2)):
        task.check(ring, rank)


def test_two_hundred_calls_keep_their_memory(world):
    import resource

    shards = task_of(world, length=400, heads=(1, 1), width=32).shards(dist.get_rank())
    memory = []
    for _ in range(200):
        ringcore.ring_attention(*shards, ring=world)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert memory[-1] - memory[50] < 4096  # KiB


def test_a_rank_that_fails_between_the_agreement_and_the_ring_tells_the_others(group, monkeypatch):
    """Memory that ran out there, say: nobody waits until the deadline."""
    import ringcore.prepared

    size = dist.get_world_size()
    ring = group(size)
    if dist.get_rank() == size - 1:

        def no_memory(q):
            raise MemoryError("planted")

        monkeypatch.setattr(ringcore.prepared, "find_arithmetic", no_memory)
    x = torch.ones(1, 1, 4, 8)

    def twice():  # a rank that had all it needed hears of it in its next call
        for _ in range(2):
            ringcore.ring_attention(x, x, x, ring=ring, causal=True)

    started = time.monotonic()
    with pytest.raises((MemoryError, ringcore.PeerError), match="planted"):
        twice()
    assert time.monotonic() - started < 20
