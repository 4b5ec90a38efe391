"""Whole models with their attention over a ring in this process, against transformers' own attention."""

import pytest
import torch
from models import CONFIGS, EAGER, PACKED, build, draw_ids, packed_batch, run, run_apart

import ringcore_transformers

pytestmark = pytest.mark.timeout(120)

# transformers' eager attention takes its softmax in float32 whatever the model's dtype.
ORACLE = {name: "eager" if name in EAGER else "sdpa" for name in CONFIGS}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


def close(came, due, allowed):
    out, gradients = due
    assert torch.linalg.vector_norm(came[0] - out) <= allowed * torch.linalg.vector_norm(out)
    assert came[1].keys() == gradients.keys()
    largest = max(float(x.norm()) for x in gradients.values())
    for name, x in gradients.items():
        assert torch.linalg.vector_norm(came[1][name] - x) <= allowed * largest, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_all_gradients_equal_those_of_stock_attention(name, size, dtype):
    ringcore_transformers.register("ring_in_process", ring_size=size, layout="zigzag" if size > 1 else "contiguous")
    model, batch = build(name, dtype), {"input_ids": draw_ids()}
    allowed = TOLERANCE[torch.float32 if ORACLE[name] == "eager" else dtype]
    close(run(model, "ring_in_process", **batch), run(model, ORACLE[name], **batch), allowed)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_right_is_hidden(name):
    ringcore_transformers.register("ring_in_process", ring_size=3)
    dtype = torch.float32 if ORACLE[name] == "eager" else torch.float64  # in float64 eager makes NaN of a hidden row
    model, ids, lengths = build(name, dtype), draw_ids(3), torch.tensor([[13], [6], [1]])
    mask = (torch.arange(13) < lengths).long()
    came, due = (run_tokens(model, attention, ids, mask) for attention in ("ring_in_process", ORACLE[name]))
    close(came, due, TOLERANCE[dtype])
    other = torch.where(mask.bool(), ids, 7)
    close(run_tokens(model, "ring_in_process", other, mask), came, TOLERANCE[dtype])


def run_tokens(model, attention, ids, mask):
    """As `run`, but what padding gives is left out: nobody defines it."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    result = model(input_ids=ids, attention_mask=mask)
    out = result.logits if hasattr(result, "logits") else result.last_hidden_state
    out = torch.where(mask[..., None].bool(), out, 0.0)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    (out * weights).sum().backward()
    kept = {n: x.grad for n, x in model.named_parameters() if x.grad is not None and "embed" not in n}
    return out.detach(), kept


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents(name, size):
    ringcore_transformers.register("ring_in_process", ring_size=size, layout="zigzag")
    model, (batch, ends) = build(name), packed_batch()
    due = run_apart(model, ORACLE[name], batch["input_ids"])
    allowed = TOLERANCE[torch.float32 if ORACLE[name] == "eager" else torch.float64]
    for cache in (False, True):
        close(run(model, "ring_in_process", **batch, **ends, use_cache=cache), due, allowed)
    whole = run(model, ORACLE[name], input_ids=batch["input_ids"])
    assert (due[0] - whole[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mistral with a window", "qwen2 with a window", "gemma2", "gpt_oss"])
def test_the_tiny_models_depend_on_their_windows(name):
    model, batch = build(name), {"input_ids": draw_ids()}
    came = run(model, ORACLE[name], **batch)[0]
    model.config.sliding_window = 100
    assert (run(model, ORACLE[name], **batch)[0] - came).abs().max() > 1e-3


def test_the_tiny_llama4_depends_on_its_chunks():
    model, ids = build("llama4"), draw_ids()
    with_chunks, _ = run(model, "ring_in_process", input_ids=ids)
    model.config.attention_chunk_size = 64
    without, _ = run(model, "ring_in_process", input_ids=ids)
    assert torch.allclose(without[:, :4], with_chunks[:, :4])  # the first chunk sees what it saw
    assert not torch.allclose(without[:, 4:], with_chunks[:, 4:], rtol=0.01)


def test_the_tiny_gpt_oss_depends_on_its_sinks():
    model, batch = build("gpt_oss"), {"input_ids": draw_ids()}
    came = run(model, "eager", **batch)[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e9)
    assert (run(model, "eager", **batch)[0] - came).abs().max() > 1e-3


def test_the_tiny_gemma2_depends_on_its_cap():
    model, batch = build("gemma2"), {"input_ids": draw_ids()}
    came = run(model, "eager", **batch)[0]
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (run(model, "eager", **batch)[0] - came).abs().max() > 1e-3


def test_a_causal_model_told_to_look_both_ways():
    ringcore_transformers.register("ring_in_process", ring_size=3)
    model, batch = build("llama"), {"input_ids": draw_ids(), "is_causal": False}
    close(run(model, "ring_in_process", **batch), run(model, "sdpa", **batch), 1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    ringcore_transformers.register("ring_in_process", ring_size=3)
    model, batch = build("llama"), {"input_ids": draw_ids()}
    due = run(model, "ring_in_process", **batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    close(run(model, "ring_in_process", **batch), due, 1e-12)


def test_a_compiled_model():
    ringcore_transformers.register("ring_in_process", ring_size=3)
    model, batch = build("llama", attention="ring_in_process"), {"input_ids": draw_ids(), "use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_autocast_and_bfloat16():
    ringcore_transformers.register("ring_in_process", ring_size=3)
    model, batch = build("llama", torch.bfloat16), {"input_ids": draw_ids()}
    close(run(model, "ring_in_process", **batch), run(build("llama"), "sdpa", **batch), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        close(run(build("llama", torch.float32), "ring_in_process", **batch), run(build("llama"), "sdpa", **batch), 0.1)


def test_rings_of_several_names_live_side_by_side():
    first = ringcore_transformers.register("ring_of_two", ring_size=2)
    second = ringcore_transformers.register("ring_of_five", ring_size=5, layout="striped")
    model, batch = build("llama"), {"input_ids": draw_ids()}
    close(run(model, "ring_of_two", **batch), run(model, "ring_of_five", **batch), 1e-11)
    assert (first.ring_size, second.ring_size) == (2, 5)
