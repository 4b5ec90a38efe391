"""Rings of GPUs by both carriers: exact, also where calls queue up or are replayed, and what they refuse."""

import gc
import time
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

import ringcore
from ringcore import DeviceError, PeerError, UnsupportedError
from ringcore_torch import TorchTransport

CARRIERS = ("peer_memory", "nccl")
HEADS, WIDTH = 2, 32


@pytest.fixture(scope="module", params=CARRIERS)
def ring(request, world):
    """One ring for all tests of a carrier: none of them may break it."""
    return TorchTransport(world, carrier=request.param)


def draw(rows, seed=0, dtype=torch.float64):
    """Whole q, k, v and dout, equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, rows, WIDTH, generator=generator).to("cuda", dtype) for _ in range(4)]


def dense(q, k, v, dout, causal):
    """out and gradients, by autograd through whole matrices in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    scores = q @ k.mT * WIDTH**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    out = torch.softmax(scores, -1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def shards(arrays, layout, ring):
    return [ringcore.shard(x, layout, ring.rank, ring.size).contiguous() for x in arrays]


def run(ring, parts, layout, causal=True):
    """This rank's out and gradients; nothing here waits for the GPU."""
    *leaves, dout = parts
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = ringcore.ring_attention(*leaves, ring=ring, layout=layout, causal=causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(ring, came, arrays, layout, causal=True, tolerance=1e-10):
    for name, x, whole in zip(("out", "dq", "dk", "dv"), came, dense(*arrays, causal), strict=True):
        due = ringcore.shard(whole, layout, ring.rank, ring.size)
        error = (x.double() - due).abs().max() if x.numel() else 0.0
        assert error <= tolerance, f"{name} is off by {error}"


def uneven(rows, size):
    """The last rank has no rows, the first has all that the others leave."""
    rest = [3] * (size - 2)
    return ringcore.from_lengths([rows - sum(rest), *rest, 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "uneven"])
def test_gradients_are_those_of_dense_attention(ring, layout, causal):
    layout = uneven(37, ring.size) if layout == "uneven" else layout
    arrays = draw(37)
    check(ring, run(ring, shards(arrays, layout, ring), layout, causal), arrays, layout, causal)


def test_calls_that_queue_up_do_not_meet(ring):
    """The host runs ahead of the GPU, and memory is handed out again long before its first use has ended."""
    problems = [draw(1024, seed, torch.float32) for seed in range(12)]
    parts = [shards(arrays, "zigzag", ring) for arrays in problems]
    found = [run(ring, part, "zigzag") for part in parts]
    for part in parts:
        for x in part:
            x.fill_(torch.nan)  # what was sent may be overwritten: its stream comes to it later
    for arrays, came in zip(problems, found, strict=True):
        check(ring, came, arrays, "zigzag", tolerance=1e-3)


def test_the_host_waits_for_no_block(ring):
    parts = shards(draw(512, dtype=torch.bfloat16), "zigzag", ring)[:3]
    ringcore.ring_attention(*parts, ring=ring, layout="zigzag", causal=True)
    torch.cuda.synchronize()
    dist.barrier()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    torch.cuda._sleep(3_000_000_000)  # cycles: more than a second
    start = time.monotonic()
    ringcore.ring_attention(*parts, ring=ring, layout="zigzag", causal=True)
    spent = time.monotonic() - start
    after.record()
    torch.cuda.synchronize()
    assert spent < before.elapsed_time(after) / 1000 / 2


def test_a_captured_call_is_replayed_on_new_numbers(ring):
    arrays = draw(256, dtype=torch.bfloat16)
    parts = shards(arrays, "zigzag", ring)

    def call():
        return ringcore.ring_attention(*parts[:3], ring=ring, layout="zigzag", causal=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in range(1, 4):
        others = draw(256, seed, torch.bfloat16)
        for mine, new in zip(parts, shards(others, "zigzag", ring), strict=True):
            mine.copy_(new)
        graph.replay()
        due = ringcore.shard(dense(*others, True)[0], "zigzag", ring.rank, ring.size)
        assert (out.double() - due).abs().max() < 2e-2
    # An eager call in between finds the ring as it was.
    check(ring, run(ring, shards(draw(64), "zigzag", ring), "zigzag"), draw(64), "zigzag")
    graph.replay()
    torch.cuda.synchronize()


def test_explain_says_how_blocks_travel(ring, request):
    carrier = request.node.callspec.params["ring"]
    run(ring, shards(draw(16), "zigzag", ring), "zigzag")
    words = {"peer_memory": "blocks on GPUs: peer memory", "nccl": "blocks on GPUs: messages: NCCL"}
    assert words[carrier] in ring.explain
    assert ring.reaches(0, 1) == (carrier == "peer_memory")


def test_what_nccl_sent_is_counted(world):
    ring = TorchTransport(world, carrier="nccl")
    parts = shards(draw(16 * ring.size), "contiguous", ring)
    ringcore.ring_attention(*parts[:3], ring=ring)
    hops = ring.size - 1
    assert (ring.messages_sent, ring.bytes_sent) == (2 * hops, 2 * hops * parts[1].nbytes)


def test_without_a_choice_gpus_that_reach_each_other_do(world):
    ring = TorchTransport(world)
    assert "or, if they do not" in ring.explain
    check(ring, run(ring, shards(draw(16), "zigzag", ring), "zigzag"), draw(16), "zigzag")
    assert "NCCL" not in ring.explain


def test_ranks_that_met_others_before(world):
    """Torch numbers its rendezvous by process: without numbers of the ring's own this one hangs."""
    alone = dist.new_group([0])
    if dist.get_rank() == 0:
        symmetric_memory.rendezvous(symmetric_memory.empty(64, device="cuda"), alone)
    ring = TorchTransport(world, carrier="peer_memory")
    check(ring, run(ring, shards(draw(16), "zigzag", ring), "zigzag"), draw(16), "zigzag")


def refused(call, here, error, words):
    """The odd rank's own error, and the others' news of it."""
    with pytest.raises(error if here else PeerError, match=words):
        call()


def test_another_current_gpu_on_one_rank_is_refused_by_name_on_all(ring):
    arrays = draw(16)
    parts = shards(arrays, "zigzag", ring)
    odd = ring.rank == ring.size - 1
    if odd:
        torch.cuda.set_device(0)
    words = rf"tensors are on cuda:{ring.size - 1}, but rank {ring.size - 1} works on GPU 0"
    refused(lambda: run(ring, parts, "zigzag"), odd, UnsupportedError, words)
    torch.cuda.set_device(parts[0].device)
    check(ring, run(ring, parts, "zigzag"), arrays, "zigzag")


def test_tensors_on_several_devices_are_refused_by_name_on_all(ring):
    arrays = draw(16)
    q, k, v, _ = parts = shards(arrays, "zigzag", ring)
    odd = ring.rank == 0
    for elsewhere in ("cpu", "cuda:1"):
        given = (q, k.to(elsewhere) if odd else k, v)
        refused(lambda given=given: ringcore.ring_attention(*given, ring=ring), odd, DeviceError, "device")
    check(ring, run(ring, parts, "zigzag"), arrays, "zigzag")


def test_a_ring_of_one_gpu_refuses_another_one(ring):
    arrays = draw(16)
    check(ring, run(ring, shards(arrays, "zigzag", ring), "zigzag"), arrays, "zigzag")
    other = torch.device("cuda", (ring.rank + 1) % ring.size)
    torch.cuda.set_device(other)
    parts = [x.to(other) for x in shards(arrays, "zigzag", ring)]
    with pytest.raises((UnsupportedError, PeerError), match=r"this ring's connections on rank . are those of cuda"):
        run(ring, parts, "zigzag")


@pytest.mark.parametrize("carrier", [None, *CARRIERS])
def test_one_gpu_for_several_ranks_is_refused_by_name_on_all(world, carrier):
    torch.cuda.set_device(0)
    ring = TorchTransport(world, carrier=carrier)
    parts = [x.to("cuda:0") for x in shards(draw(16), "zigzag", ring)]
    with pytest.raises(UnsupportedError, match=r"ranks \[0, 1.*\] share a GPU.*torch\.cuda\.set_device"):
        run(ring, parts, "zigzag")
    torch.cuda.empty_cache()


def test_ranks_that_ask_for_different_carriers_all_hear_it(world):
    ring = TorchTransport(world, carrier=CARRIERS[dist.get_rank() % 2])
    with pytest.raises(ringcore.KeywordError, match=r"different carriers: \['peer_memory', 'nccl'"):
        run(ring, shards(draw(16), "zigzag", ring), "zigzag")


def test_a_ring_that_was_dropped_and_made_again(world):
    for _ in range(3):
        ring = TorchTransport(world, carrier="nccl")
        check(ring, run(ring, shards(draw(16), "zigzag", ring), "zigzag"), draw(16), "zigzag")
        gone = weakref.ref(ring)
        del ring
        gc.collect()
        assert gone() is None
