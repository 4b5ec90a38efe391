"""Gradients that Torch records over a ring, checked across its ranks."""

import pytest
import torch
import torch.distributed as dist
from across import dense, draw, whole_attention
from torch.autograd import gradcheck

import ringcore

FEATURES = {
    "plain": {},
    "causal zigzag": {"causal": True, "layout": "zigzag"},
    "window striped": {"window": (2, 1), "layout": "striped"},
    "softcap": {"softcap": 1.5},
    "offset": {"causal": True, "query_offset": 2},
    "key lengths": {"key_lengths": [4]},
    "documents": {"documents": [0, 0, 1, 1, 1]},
    "other axes": {"causal": True, "axes": "bshd"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_of_out_and_lse_equal_finite_differences_across_ranks(world, feature):
    keywords = FEATURES[feature]
    given = draw()
    if "axes" in keywords:
        given = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in given]
    assert gradcheck(lambda q, k, v: whole_attention(q, k, v, ring=world, **keywords), given)


def test_gradients_on_uneven_and_empty_shards(world):
    size = dist.get_world_size()
    layout = ringcore.from_lengths([5, 0, 1, 0][:size])
    rows = layout.length
    assert gradcheck(lambda q, k, v: whole_attention(q, k, v, ring=world, layout=layout, causal=True), draw(rows))


def test_gradient_of_a_bias_with_rows(world):
    bias = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    given = draw(grad=False)
    assert gradcheck(lambda bias: whole_attention(*given, ring=world, bias=bias, causal=True), [bias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_every_dtype(world, dtype):
    given = draw(rows=61, heads=4, key_heads=2, width=16, values=16, dtype=dtype)
    out, lse = whole_attention(*given, ring=world, causal=True, layout="zigzag")
    due = dense(*given)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]

    def check(came, true):
        torch.testing.assert_close(
            came.double(), true.double(), atol=allowed * float(true.detach().abs().max()), rtol=0
        )

    check(out, due[0])
    check(lse, due[1])
    came = torch.autograd.grad(out.double().square().sum() + lse.double().sin().sum(), given)
    true = torch.autograd.grad(due[0].square().sum() + due[1].sin().sum(), given)
    for x, y in zip(came, true, strict=True):
        assert x.dtype == dtype
        check(x, y)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv", "kv"])
def test_only_what_requires_grad_gets_one(world, wanted):
    whole = draw()
    due = dict(zip("qkv", torch.autograd.grad(dense(*whole)[0].sum(), whole), strict=True))
    given = {name: x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", whole, strict=True)}
    whole_attention(**given, ring=world, causal=True)[0].sum().backward()
    for name, x in given.items():
        assert (x.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(x.grad, due[name])


def test_ranks_that_want_different_gradients_hear_so_before_one_waits_for_another(world):
    if dist.get_world_size() > 1:
        q, k, v = draw(grad=False)
        k.requires_grad_(dist.get_rank() == 1)
        with pytest.raises(ringcore.AgreementError, match=r"disagree on wrt: None on rank 0, \['k'\] on rank 1"):
            ringcore.ring_attention(q, k, v, ring=world)
        assert ringcore.ring_attention(*draw(grad=False), ring=world).grad_fn is None


def test_a_backward_while_others_go_forward_is_an_error_on_every_rank(world):
    if dist.get_world_size() > 1:
        given = draw()
        out = ringcore.ring_attention(*given, ring=world)
        step = out.sum().backward if dist.get_rank() == 0 else lambda: ringcore.ring_attention(*given, ring=world)
        with pytest.raises(ringcore.AgreementError, match="disagree on call"):
            step()
        out.sum().backward()  # all together: the ring is as good as before
        assert all(x.grad is not None for x in given)


def test_a_gradient_may_be_taken_twice(world):
    given = draw()
    out = ringcore.ring_attention(*given, ring=world, causal=True)
    first = torch.autograd.grad(out.sum(), given, retain_graph=True)
    second = torch.autograd.grad(out.sum(), given)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_the_same_call_gives_the_same_bits(world):
    given = draw(rows=200, width=16, values=16, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out, lse = whole_attention(*given, ring=world, causal=True, layout="zigzag")
            runs.append((out, lse, *torch.autograd.grad(out.square().sum(), given)))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))
