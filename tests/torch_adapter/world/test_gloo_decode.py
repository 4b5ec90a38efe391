"""Decoding over a cache on all ranks of a torch.distributed ring."""

import pytest
import torch
import torch.distributed as dist
from decoding import CALLS, check

import ringcore
from ringcore_torch import TorchTransport


@pytest.fixture(scope="module")
def ring(world):
    return TorchTransport(dist.group.WORLD)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("name", CALLS)
def test_decoding(ring, layout, name, rows):
    bits = check(ring, layout, name, rows, torch.from_numpy, lambda x: x.numpy())
    found = [None] * ring.size
    dist.all_gather_object(found, bits)
    assert len(set(found)) == 1


def test_parameters_of_a_model_are_taken_where_nothing_is_recorded(ring):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, rows, 8, generator=generator) for rows in (1, 12, 12))
    sinks = torch.nn.Parameter(torch.zeros(2))
    mine = [ringcore.shard(x, "contiguous", ring.rank, ring.size).contiguous().requires_grad_() for x in (k, v)]
    with pytest.raises(ringcore.UnsupportedError, match="requires grad, but decode_attention has no gradients"):
        ringcore.decode_attention(q, *mine, ring=ring, sinks=sinks)
    due, _ = ringcore.decode_attention(q, k, v, sinks=sinks.detach())
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            out, _ = ringcore.decode_attention(q.requires_grad_(), *mine, ring=ring, sinks=sinks)
        torch.testing.assert_close(out, due)
        assert not out.requires_grad
