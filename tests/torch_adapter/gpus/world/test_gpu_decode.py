"""Decoding over a cache on several GPUs: small tensors of all ranks, read from their memory or passed around."""

import pytest
import torch
import torch.distributed as dist
from decoding import CALLS, check

import ringcore
from ringcore import TransportError
from ringcore_torch import TorchTransport


@pytest.fixture(scope="module", params=["peer_memory", "nccl"])
def ring(request, world):
    return TorchTransport(world, carrier=request.param)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("name", CALLS)
def test_decoding(ring, layout, name, rows):
    bits = check(ring, layout, name, rows, lambda x: torch.from_numpy(x).cuda(), lambda x: x.cpu().numpy())
    found = [None] * ring.size
    dist.all_gather_object(found, bits)
    assert len(set(found)) == 1


def test_a_captured_call_is_replayed_over_new_queries_and_keys(ring):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, s, 64, generator=generator).cuda() for h, s in ((8, 1), (2, 96), (2, 96)))
    mine = [ringcore.shard(x, "striped", ring.rank, ring.size).contiguous() for x in (k, v)]
    keywords = {"ring": ring, "layout": "striped", "key_lengths": [90, 33]}
    asked, stream = q.clone(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            ringcore.decode_attention(asked, *mine, **keywords)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, _ = ringcore.decode_attention(asked, *mine, **keywords)
    for n in range(6):
        asked.copy_(q * (n + 1))
        if n == 3:  # a call of another kind in between
            ringcore.decode_attention(asked, *mine, ring=ring, layout="striped")
        if ring.rank == n % ring.size:
            torch.cuda._sleep(3_000_000)
        graph.replay()
        due, _ = ringcore.decode_attention(q.double() * (n + 1), k.double(), v.double(), key_lengths=[90, 33])
        assert float((out - due).abs().max()) < 1e-5


def test_a_capture_of_what_was_not_agreed_on_is_refused(ring):
    q, k, v = (torch.zeros(1, h, s, 64, device="cuda") for h, s in ((8, 1), (2, 48), (2, 48)))
    ringcore.decode_attention(q, k, v, ring=ring, key_lengths=[20])
    torch.cuda.synchronize()
    with pytest.raises(TransportError, match="not what they last agreed on"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ringcore.decode_attention(q, k, v, ring=ring, key_lengths=[21])


def test_calls_that_queue_up_on_several_streams_do_not_mix(ring):
    """Each call's numbers are its own, though no host waits for a GPU and sizes grow beyond what there was room for."""
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    calls = []
    for n in range(24):
        heads = 2 << n // 6  # the last ones need more than a slot of 64 KiB
        generator = torch.Generator().manual_seed(n)
        q, k, v = (torch.randn(2, h, s, 64, generator=generator).cuda() for h, s in ((heads, 4), (2, 64), (2, 64)))
        mine = [ringcore.shard(x, "striped", ring.rank, ring.size).contiguous() for x in (k, v)]
        calls.append((q, k, v, mine))
    torch.cuda.synchronize()
    found = []
    for n, (q, _, _, mine) in enumerate(calls):
        with torch.cuda.stream(streams[n % 3]):
            if (n + ring.rank) % 3 == 0:
                torch.cuda._sleep(2_000_000)
            found.append(ringcore.decode_attention(q, *mine, ring=ring, layout="striped")[0])
    torch.cuda.synchronize()
    for out, (q, k, v, _) in zip(found, calls, strict=True):
        due, _ = ringcore.decode_attention(q.double(), k.double(), v.double())
        assert float((out - due).abs().max()) < 1e-5
