"""What Torch users wrap a model in, around attention over a ring."""

import pytest
import torch
import torch.distributed as dist
from across import dense, draw, gathered
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import ringcore


def shards(arrays, layout="contiguous"):
    rank, size = dist.get_rank(), dist.get_world_size()
    return [ringcore.shard(x.detach(), layout, rank, size).requires_grad_() for x in arrays]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(world, reentrant):
    def attend(q, k, v):
        return ringcore.ring_attention(q.sin(), k, v, causal=True, ring=world)

    given = shards(draw())
    checkpoint(attend, *given, use_reentrant=reentrant).square().sum().backward()
    due = torch.autograd.grad(attend(*given).square().sum(), given)
    for x, y in zip(given, due, strict=True):
        assert torch.equal(x.grad, y)


def test_autocast(world):
    given = shards(draw(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = ringcore.ring_attention(*given, ring=world)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in given)


def test_autocast_on_one_rank_is_an_error_on_every_rank(world):
    if dist.get_world_size() > 1:
        given = shards(draw(dtype=torch.float32))
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dist.get_rank() == 0),
            pytest.raises(ringcore.AgreementError, match="disagree on dtype"),
        ):
            ringcore.ring_attention(*given, ring=world)


@pytest.mark.parametrize("named", ["group", "mesh"])
@pytest.mark.parametrize("keywords", [{"causal": True}, {"window": (3, 0), "layout": "zigzag"}])
def test_compiled_code_has_no_break_and_the_same_numbers(world, keywords, named):
    ring = world if named == "group" else init_device_mesh("cpu", (dist.get_world_size(),))

    def model(q, k, v):
        out, lse = ringcore.ring_attention(q * 2, k, v, ring=ring, return_lse=True, **keywords)
        return out * 3, lse

    given = shards(draw(rows=24, dtype=torch.float32), keywords.get("layout", "contiguous"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [compiled(*given), model(*given)]
    for came, due in zip(*results, strict=True):
        assert torch.equal(came, due)
    first, second = (torch.autograd.grad(out.sum() + lse.sum(), given) for out, lse in results)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


class Layer(nn.Module):
    """A transformer's attention over the rows that this rank holds."""

    def __init__(self, ring, width=8, heads=2):
        super().__init__()
        self.ring, self.heads = ring, heads
        self.inward = nn.Linear(width, 3 * width, dtype=torch.float64)
        self.outward = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.inward(x).chunk(3, -1))
        out = ringcore.ring_attention(q, k, v, ring=self.ring, causal=True) if self.ring else dense(q, k, v)[0]
        return x + self.outward(out.transpose(1, 2).flatten(2))


def model_of(ring):
    torch.manual_seed(3)
    return nn.Sequential(*[Layer(ring) for _ in range(2)])


def whole_gradient(parameter):
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("sharded", ["fully_shard", "FullyShardedDataParallel"])
def test_a_model_whose_parameters_are_sharded_over_the_same_ranks(world, sharded):
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4 * size + 1, 8, dtype=torch.float64, generator=generator)
    true, model = model_of(None), model_of(world)
    out = true(x)
    out.square().sum().backward()
    due = [parameter.grad for parameter in true.parameters()]

    mine = ringcore.shard(x, "contiguous", rank, size, axis=1)
    if sharded == "fully_shard":
        mesh = init_device_mesh("cpu", (size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    came = model(mine)
    torch.testing.assert_close(gathered(came, "contiguous", axis=1), out.detach())
    came.square().sum().backward()
    if sharded == "fully_shard":
        gradients = [whole_gradient(parameter) for parameter in model.parameters()]
    else:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
    for gradient, true_gradient in zip(gradients, due, strict=True):
        torch.testing.assert_close(gradient * size, true_gradient)  # both average over ranks; these rows are summed
