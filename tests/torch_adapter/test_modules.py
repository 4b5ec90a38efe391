"""Dilated attention as modules: the function they call, their parameters, and dropout in training alone."""

import pytest
import torch

import ringcore
from ringcore_torch import DilatedAttention, MultiheadDilatedAttention

BRANCHES = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}


def draw(*shape):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_function_on_sequence_first_tensors(causal):
    q, k, v = draw(2, 13, 4, 8)
    module = DilatedAttention(**BRANCHES, softmax_scale=0.7, head_offset="block", ring_size=3, layout="zigzag")
    due = ringcore.dilated_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), **BRANCHES, scale=0.7, head_offset="block", causal=causal
    )
    torch.testing.assert_close(module(q, k, v, is_causal=causal), due.transpose(1, 2))


def test_dropout_is_for_training_and_drawn_from_torchs_generator():
    q, k, v = draw(1, 13, 2, 8)
    module = DilatedAttention(**BRANCHES, attention_dropout=0.5)
    torch.manual_seed(1)
    first, second = module(q, k, v), module(q, k, v)
    torch.manual_seed(1)
    torch.testing.assert_close(module(q, k, v), first)
    assert not torch.equal(first, second)
    plain = DilatedAttention(**BRANCHES)(q, k, v)
    torch.testing.assert_close(module.eval()(q, k, v), plain)


def test_it_compiles_without_dropout_alone():
    module = DilatedAttention(**BRANCHES, attention_dropout=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arrays = draw(1, 13, 2, 8)
    module.eval()
    torch.testing.assert_close(compiled(*arrays), module(*arrays))
    module.train()
    with pytest.raises(Exception, match="draws a seed for each call"):
        compiled(*arrays)


def test_heads_and_projections():
    layer = MultiheadDilatedAttention(16, 4, BRANCHES["dilation_rates"], BRANCHES["segment_lengths"], gamma_init=0.5)
    assert sorted(layer.state_dict()) == sorted(
        f"{name}.{part}" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "norm") for part in ("weight", "bias")
    )
    (x, *_) = draw(2, 13, 16)
    x.requires_grad_()
    out, weights = layer(x, x, x, is_causal=True)
    assert weights is None
    q, k, v = (part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    inner = ringcore.dilated_attention(q, k, v, **BRANCHES, causal=True).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(out, layer.out_proj(layer.norm(inner)))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert "segment_lengths=(4, 8)" in repr(layer)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ringcore.KeywordError, match=r"embed_dim is 10 and num_heads 4; .* second divides"):
        MultiheadDilatedAttention(10, 4, [1], [4])
    for sizes in ((0, 4), (8, 0), (8, 4.0)):
        with pytest.raises(ringcore.KeywordError, match="must be whole numbers"):
            MultiheadDilatedAttention(*sizes, [1], [4])
    with pytest.raises(ringcore.KeywordError, match="segment_lengths is 4; it must hold a whole number"):
        DilatedAttention(4, 1)
    with pytest.raises(ringcore.KeywordError, match=r"attention_dropout is 2\.0"):
        DilatedAttention([4], [1], attention_dropout=2.0)
    layer = MultiheadDilatedAttention(8, 2, [1], [4], layer_norm=False, bias=False)
    with pytest.raises(ringcore.DtypeError, match="query is a list; it must be a tensor"):
        layer([1.0], [1.0], [1.0])
    with pytest.raises(ringcore.ShapeError, match=r"query has shape \(3, 8\); it must be \[B, N, 8\]"):
        layer(*draw(3, 8))
    with pytest.raises(ringcore.ShapeError, match=r"value has shape \(1, 4, 6\)"):
        layer(*draw(1, 4, 8)[:2], torch.zeros(1, 4, 6))
    with pytest.raises(ringcore.KeywordError, match="1 segment_lengths and 2 dilation_rates"):
        DilatedAttention([4], [1, 2])(*draw(1, 4, 2, 8))
