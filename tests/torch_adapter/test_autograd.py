"""Gradients that Torch records: against finite differences, and under what Torch users wrap a model in."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ringcore

pytestmark = pytest.mark.timeout(120)

# Along random directions, for one by one takes a minute where there is a bias; where Torch multiplies atol by hundreds.
gradcheck = partial(torch.autograd.gradcheck, fast_mode=True, atol=1e-8)


def draw(batch=1, heads=4, key_heads=2, rows=7, keys=7, width=4, values=3, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(5)
    shapes = (batch, heads, rows, width), (batch, key_heads, keys, width), (batch, key_heads, keys, values)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_(grad) for s in shapes]


def dense(q, k, v, hidden, scale=None):
    """Attention written out, with whole matrices: ``hidden`` is added to the scores."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5) + hidden
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def causal(rows, keys):
    return torch.full((rows, keys), -torch.inf, dtype=torch.float64).triu(1)


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "causal zigzag": {"causal": True, "layout": "zigzag"},
    "window": {"window": (2, 1), "layout": "striped"},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3},
    "offset": {"causal": True, "query_offset": 2},
    "key lengths": {"key_lengths": [5]},
    "documents": {"documents": [0, 0, 0, 1, 1, 0, 2], "layout": "zigzag"},
    "documents in a tensor": {"documents": torch.tensor([[0, 0, 1, 1, 1, 1, 1]]), "causal": True},
    "cu_seqlens": {"cu_seqlens": torch.tensor([0, 2, 7]), "causal": True},
    "documents made once": {"documents": ringcore.Documents.from_cu_seqlens([0, 4, 7])},
    "two layouts": {"q_layout": "zigzag", "k_layout": "striped", "causal": True},
    "reference kernels": {"kernels": "reference", "causal": True},
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_of_out_and_lse_equal_finite_differences(feature, size):
    def attend(q, k, v):
        return ringcore.ring_attention(q, k, v, ring_size=size, return_lse=True, **FEATURES[feature])

    assert gradcheck(attend, draw())


@pytest.mark.parametrize("axes", ["bhsd", "bshd"])
def test_gradients_with_a_custom_layout_a_bias_and_a_mask(axes):
    layout = ringcore.Layout(((range(3, 7),), (range(0, 3, 2),), (range(1, 2),)))
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    bias = torch.randn(4, 7, 7, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, bias):
        q, k, v = (x if axes == "bhsd" else x.transpose(1, 2) for x in (q, k, v))
        return ringcore.ring_attention(
            q, k, v, bias=bias, mask=mask, ring_size=3, layout=layout, axes=axes, return_lse=True
        )

    assert gradcheck(attend, (*draw(), bias))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kernels", [None, "reference"])
def test_gradients_of_sinks(kernels, size):
    sinks = torch.tensor([3.0, -torch.inf, 0.5, -2.0], dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, finite):
        given = torch.cat([finite[:1], torch.full_like(finite[:1], -torch.inf), finite[1:]])
        keywords = {"causal": True, "key_lengths": [4], "layout": "zigzag", "ring_size": size, "kernels": kernels}
        return ringcore.ring_attention(q, k, v, sinks=given, return_lse=True, **keywords)

    finite = sinks[[0, 2, 3]].detach().requires_grad_()
    assert gradcheck(attend, (*draw(), finite))


@pytest.mark.parametrize("axes", ["bhsd", "bshd"])
@pytest.mark.parametrize(("kernels", "size"), [(None, 1), (None, 3), ("reference", 2)])
def test_gradients_of_a_prefix(kernels, size, axes):
    generator = torch.Generator().manual_seed(4)
    q, k, v = draw()
    prefix = [
        torch.randn((*x.shape[:2], 3, x.shape[3]), generator=generator, dtype=x.dtype).requires_grad_() for x in (k, v)
    ]

    def attend(*arrays):
        q, k, v, *prefix = (x if axes == "bhsd" else x.transpose(1, 2) for x in arrays)
        keywords = {"causal": True, "layout": "zigzag", "ring_size": size, "kernels": kernels, "axes": axes}
        return ringcore.ring_attention(q, k, v, prefix=tuple(prefix), return_lse=True, **keywords)

    assert gradcheck(attend, (q, k, v, *prefix))


def test_gradients_under_a_mask_of_positions():
    steps = torch.tensor([0, 1, 0, 1, 1, 0, 1])

    def attend(q, k, v):
        def mask(i, j):  # which nobody but the call holds when gradients are made
            return steps[i] >= steps[j]

        return ringcore.ring_attention(q, k, v, mask=mask, ring_size=2, layout="zigzag", return_lse=True)

    assert gradcheck(attend, draw())
    q, k, v = draw(grad=False)
    due = ringcore.ring_attention(q, k, v, mask=steps[:, None] >= steps[None, :])
    torch.testing.assert_close(attend(q, k, v)[0], due)


def test_dilated_attention_is_differentiable_and_one_operator():
    branches = {"segment_lengths": [3, 7], "dilation_rates": [1, 2], "causal": True}

    def attend(q, k, v):
        return ringcore.dilated_attention(q, k, v, **branches, ring_size=2, layout="zigzag", return_lse=True)

    assert gradcheck(attend, draw())
    arrays = draw(grad=False)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arrays), attend(*arrays))


def test_slopes_of_alibi_get_no_gradient():
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)
    assert gradcheck(lambda *x: ringcore.ring_attention(*x, alibi=slopes, causal=True, ring_size=2), draw())
    with pytest.raises(ringcore.UnsupportedError, match="alibi requires grad, but no gradient of its slopes is made"):
        ringcore.ring_attention(*draw(), alibi=slopes.requires_grad_())


def test_autocast_casts_a_prefix_too():
    arrays = [torch.randn(1, 2, 8, 4) for _ in range(3)]
    prefix = tuple(torch.randn(1, 2, 3, 4) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ringcore.ring_attention(*arrays, prefix=prefix)
    assert out.dtype == torch.bfloat16
    due = ringcore.ring_attention(*(x.bfloat16() for x in arrays), prefix=tuple(x.bfloat16() for x in prefix))
    assert torch.equal(out, due)


def test_only_what_requires_grad_gets_one():
    q, k, v = draw()
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        given = [x.detach().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=True)]
        out = ringcore.ring_attention(*given, causal=True, ring_size=2)
        out.sum().backward()
        due = torch.autograd.grad(dense(q, k, v, causal(7, 7))[0].sum(), (q, k, v))
        for x, want, gradient in zip(given, wanted, due, strict=True):
            assert (x.grad is not None) == want
            if want:
                torch.testing.assert_close(x.grad, gradient)


def test_lse_alone_can_be_differentiated():
    q, k, v = draw()
    _, lse = ringcore.ring_attention(q, k, v, ring_size=2, return_lse=True)
    came = torch.autograd.grad(lse.sin().sum(), (q, k))
    due = torch.autograd.grad(dense(q, k, v, 0.0)[1].sin().sum(), (q, k))
    torch.testing.assert_close(came, due)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_masked_key_holds_reaches_nothing(dtype, poison, size):
    q, k, v = (x.detach() for x in draw(rows=12, keys=12, dtype=dtype))
    mask = torch.ones(12, 12, dtype=torch.bool)
    mask[:, 3], mask[5] = False, False
    results = []
    for number in (0.0, poison):
        bad = [x.clone() for x in (k, v)]
        for x in bad:
            x[:, :, 3] = number
        given = [x.requires_grad_() for x in (q.clone(), *bad)]
        out, lse = ringcore.ring_attention(*given, mask=mask, ring_size=size, return_lse=True, kernels="torch.cpu")
        results.append((out, lse, *torch.autograd.grad(out.float().sum() + lse[:, :, :5].sum(), given)))
    for clean, came in zip(*results, strict=True):
        assert torch.equal(clean, came)
    assert (results[1][0][:, :, 5] == 0).all()


def test_gradients_of_grouped_heads_are_added_in_float32():
    q, k, v = (x.detach() for x in draw(heads=16, key_heads=1, rows=512, keys=512, width=32, values=32))

    def error(group):
        given = [x.bfloat16().requires_grad_() for x in (q[:, :group], k, v)]
        out = ringcore.ring_attention(*given, kernels="torch.cpu")
        wide = [x.detach().double().requires_grad_() for x in given]
        came, due = torch.autograd.grad(out.sum(), given), torch.autograd.grad(dense(*wide, 0.0)[0].sum(), wide)
        return float((came[2].double() - due[2]).norm() / due[2].norm())

    assert error(16) <= 1.2 * error(1)


def test_nothing_is_recorded_without_need():
    q, k, v = draw()
    with torch.no_grad():
        assert ringcore.ring_attention(q, k, v).grad_fn is None
    assert ringcore.ring_attention(*(x.detach() for x in (q, k, v))).grad_fn is None


def test_what_is_saved_is_the_inputs_the_output_and_the_row_statistics():
    q, k, v = draw(rows=64, keys=64, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = ringcore.ring_attention(q, k, v, causal=True, ring_size=4)
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert sum(kept.values()) <= sum(x.nbytes for x in (q, k, v, out)) + 2 * 4 * 4 * 64


@pytest.mark.parametrize("axes", ["bhsd", "bshd"])
def test_strided_and_broadcast_inputs(axes):
    def strided(x):
        x = x if axes == "bhsd" else x.transpose(1, 2)
        return torch.stack([x, x], -1)[..., 0]  # no axis lies without gaps

    q, k, v = draw()
    given = [q, k[:, :1].expand(-1, 2, -1, -1), v]
    made = [strided(x) for x in given[::2]]
    out = ringcore.ring_attention(
        made[0], given[1] if axes == "bhsd" else given[1].transpose(1, 2), made[1], causal=True, axes=axes, ring_size=2
    )
    out = out if axes == "bhsd" else out.transpose(1, 2)
    due = dense(*given, causal(7, 7))[0]
    torch.testing.assert_close(out, due)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    came = torch.autograd.grad((out * weights).sum(), (q, k, v))
    torch.testing.assert_close(came, torch.autograd.grad((due * weights).sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    q, k, v = draw(rows=50, keys=50, width=16, values=16, dtype=dtype)
    out = ringcore.ring_attention(q, k, v, causal=True, ring_size=3)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    due = dense(*wide, causal(50, 50))[0]
    torch.testing.assert_close(out.double(), due, atol=2e-2, rtol=0)
    came = torch.autograd.grad(out.double().square().sum(), (q, k, v))
    for x, y in zip(came, torch.autograd.grad(due.square().sum(), wide), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, atol=0.03 * float(y.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_of_fused_kernels_does_not_grow_with_the_ring(dtype):
    hidden = causal(512, 512)

    def errors(seed, size):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(1, 2, 512, 64, generator=generator).to(dtype) for _ in range(3)]
        dout = torch.randn(1, 2, 512, 64, generator=generator).to(dtype)
        found = []
        for arrays in (given, [x.double() for x in given]):
            arrays = [x.requires_grad_() for x in arrays]
            if arrays[0].dtype == dtype:
                out = ringcore.ring_attention(*arrays, causal=True, ring_size=size, kernels="torch.cpu")
            else:
                out = dense(*arrays, hidden)[0]
            found.append((out, *torch.autograd.grad(out, arrays, dout.to(out.dtype))))
        return [
            float((x.detach().double() - due.detach()).norm() / due.detach().norm())
            for x, due in zip(*found, strict=True)
        ]

    allowed = 1.2 if dtype == torch.float32 else 1.3  # the kernels round each tile to half, a ring of 1 only once
    medians = [torch.tensor([errors(seed, size) for seed in range(3)]).median(0).values for size in (1, 64)]
    for name, alone, ring in zip(("out", "dq", "dk", "dv"), *medians, strict=True):
        print(f"\n{dtype} {name}: {alone:.3g} at ring 1, {ring:.3g} at ring 64", end="")
        assert ring <= allowed * alone, name


def test_autocast_casts_as_scaled_dot_product_attention_does():
    q, k, v = draw(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ringcore.ring_attention(q, k, v, ring_size=2)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 2])
def test_autocast_leaves_float32_in_the_kernels(size):
    """What is computed in float32 is no business of autocast: bias and softcap take the reference kernels."""
    q, k, v = (3 * x.detach() for x in draw(rows=40, keys=40, width=32, values=32, dtype=torch.float32))
    keywords = {"bias": torch.zeros(40, 40), "return_lse": True, "ring_size": size, "softcap": 50.0}
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = ringcore.ring_attention(q, k, v, **keywords)
    due, due_lse = ringcore.ring_attention(*(x.bfloat16() for x in (q, k, v)), **keywords)
    assert torch.equal(out, due)
    assert torch.equal(lse, due_lse)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    def attend(q, k, v):
        return ringcore.ring_attention(q.sin(), k, v, causal=True, ring_size=2)

    q, k, v = draw()
    came = checkpoint(attend, q, k, v, use_reentrant=reentrant)
    came.square().sum().backward()
    due = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    for x, y in zip((q, k, v), due, strict=True):
        assert torch.equal(x.grad, y)


@pytest.mark.parametrize("keywords", [{"causal": True}, {"window": (3, 0), "layout": "zigzag", "axes": "bshd"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_has_no_break_and_the_same_numbers(dtype, keywords):
    def model(q, k, v):
        out, lse = ringcore.ring_attention(q * 2, k, v, ring_size=2, return_lse=True, **keywords)
        return out * 3, lse

    given = draw(rows=8, keys=8, heads=8, key_heads=8, values=4, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [compiled(*given), model(*given)]
    for came, due in zip(*results, strict=True):
        assert came.stride() == due.stride()
        assert torch.equal(came, due)
    first, second = (torch.autograd.grad(out.sum() + lse.sum(), given) for out, lse in results)
    for came, due in zip(first, second, strict=True):
        assert torch.equal(came, due)


def test_numbers_in_tensors_are_refused_where_a_graph_would_freeze_them():
    def model(q, n):
        return ringcore.ring_attention(q, q, q, key_lengths=n)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"key_lengths is a Tensor, whose numbers torch\.compile would take from the first"
    ):
        compiled(draw(grad=False)[0], torch.tensor([5]))
    assert torch.equal(model(q := draw(grad=False)[0], torch.tensor([5])), model(q, [5]))


def test_the_operators_obey_torchs_rules():
    from ringcore_torch.keywords import text_of

    keywords = text_of(
        ring=None, ring_size=2, causal=True, window=(3, None), scale=None, softcap=None, query_offset=0,
        key_lengths=None, layout="zigzag", axes="bshd", kernels=None,
    )  # fmt: skip
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in draw())
    sinks = torch.zeros(q.shape[2], dtype=q.dtype, requires_grad=True)
    prefix = [x[:, :2].detach().requires_grad_() for x in (k, v)]
    torch.library.opcheck(torch.ops.ringcore.attend.default, (q, k, v, None, None, sinks, *prefix, None, keywords))


def test_the_same_call_gives_the_same_bits():
    q, k, v = draw(rows=200, keys=200, width=16, values=16, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            out = ringcore.ring_attention(q, k, v, causal=True, ring_size=3)
            runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("rows", [1, 3])
def test_merges_leave_alone_what_kernels_share(rows):
    q, k = (torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(n)) for n in (rows, 4))
    first, second = (ringcore.ring_attention(q, k, k, ring_size=2) for _ in range(2))
    torch.testing.assert_close(first, torch.nn.functional.scaled_dot_product_attention(q, k, k))
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused_by_name():
    q, k, v = draw()
    (gradient,) = torch.autograd.grad(ringcore.ring_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(ringcore.UnsupportedError, match="differentiated twice"):
        torch.autograd.grad(gradient.sum(), q)


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (lambda f, q: torch.func.jvp(f, (q,), (q,)), "forward-mode"),
        (lambda f, q: torch.func.vmap(f)(q[None]), "vmap"),
        (lambda f, q: torch.func.grad(lambda x: f(x).sum())(q), "torch.func.grad"),
    ],
)
def test_transforms_are_refused_by_name(transform, said):
    q, k, v = draw(grad=False)
    with pytest.raises(ringcore.UnsupportedError, match=said):
        transform(lambda x: ringcore.ring_attention(x, k, v), q)


def test_bad_arguments_get_the_same_errors_as_with_any_library():
    q, k, v = draw()
    with pytest.raises(ringcore.ShapeError, match="share the width"):
        ringcore.ring_attention(q[..., :2], k, v)
    with pytest.raises(ringcore.DeviceError, match="different libraries"):
        ringcore.ring_attention(q, k.detach().numpy(), v)
    with pytest.raises(ringcore.KeywordError, match="return_lse"):
        ringcore.ring_attention(q, k, v, return_lse=1)
    with pytest.raises(ringcore.KeywordError, match="query_offset"):
        ringcore.ring_attention(q, k, v, query_offset=object())
    with pytest.raises(ringcore.DeviceError, match="meta"):
        ringcore.ring_attention(q, k, v, bias=torch.zeros(7, 7, device="meta"))
