"""Grids of heads and ring over process groups and meshes: autograd, compiled calls, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ringcore
from ringcore import KeywordError, PeerError, ShapeError

LENGTH = 20


@pytest.fixture(scope="module")
def mesh(world):
    heads = 2 if dist.get_world_size() % 2 == 0 else 1
    return init_device_mesh("cpu", (dist.get_world_size() // heads, heads), mesh_dim_names=("ring", "heads"))


def draw():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, heads, LENGTH, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def mine(x):
    return ringcore.shard(x, "zigzag", dist.get_rank(), dist.get_world_size()).contiguous()


def gradients(attend, arrays, dout):
    leaves = [x.detach().requires_grad_() for x in arrays]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("keywords", [{"causal": True}, {"dropout": 0.3, "dropout_seed": 4}], ids=str)
def test_autograd_over_a_mesh(mesh, keywords, compiled):
    *arrays, dout = draw()
    due = gradients(lambda *x: ringcore.ring_attention(*x, **keywords), arrays, dout)

    def attend(q, k, v):
        return ringcore.ring_attention(q, k, v, ring=mesh, layout="zigzag", **keywords)

    attend = torch.compile(attend, backend="aot_eager") if compiled else attend
    for _ in range(2):
        came = gradients(attend, map(mine, arrays), mine(dout))
        for x, expected in zip(came, due, strict=True):
            torch.testing.assert_close(x, mine(expected), atol=1e-11, rtol=1e-11)


def test_two_groups_are_the_same_grid(mesh):
    groups = mesh.get_group("ring"), mesh.get_group("heads")
    assert ringcore.find_ring(groups) is ringcore.find_ring(mesh)
    q, k, v, _ = draw()
    out = ringcore.ring_attention(mine(q), mine(k), mine(v), ring=groups, layout="zigzag")
    torch.testing.assert_close(out, mine(ringcore.ring_attention(q, k, v)))


def test_meshes_that_are_neither_ring_nor_grid(mesh):
    q, k, v, _ = map(mine, draw())
    cube = init_device_mesh("cpu", (dist.get_world_size(), 1, 1))
    with pytest.raises(KeywordError, match="ring is a mesh of 3 dimensions"):
        ringcore.ring_attention(q, k, v, ring=cube)
    if mesh.size(1) > 1:
        with pytest.raises(ShapeError, match="k and v have 1 heads"):
            ringcore.ring_attention(q, k[:, :1], v[:, :1], ring=mesh)


@pytest.mark.parametrize("rings", [("group", None), (None, "group"), ("group",)], ids=str)
def test_what_is_no_two_groups_is_refused_by_name(mesh, rings):
    q, k, v, _ = map(mine, draw())
    given = tuple(each and mesh.get_group("ring") for each in rings)
    with pytest.raises(KeywordError, match=r"ring (is a .*NoneType|holds 1 group)"):
        ringcore.ring_attention(q, k, v, ring=given)


def test_groups_in_the_other_order_on_one_rank_are_refused(mesh):
    if dist.get_world_size() != 4:
        pytest.skip("2 by 2 is the grid that has both orders")
    q, k, v, _ = map(mine, draw())
    groups = mesh.get_group("ring"), mesh.get_group("heads")
    for ring in (groups, groups[::-1]):
        ringcore.ring_attention(q, k, v, ring=ring)
    with pytest.raises((KeywordError, PeerError), match="ring is two groups here"):
        ringcore.ring_attention(q, k, v, ring=groups[::-1] if dist.get_rank() == 0 else groups)
