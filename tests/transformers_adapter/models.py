"""Tiny models with random weights, and what one step of them gives."""

from itertools import pairwise

import torch
import transformers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
ENCODER = {**SIZES, "max_position_embeddings": 64}
SPECIAL = "pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"
HYBRID = ["full_attention", "sliding_attention"]
EAGER = "gemma2", "gpt_oss", "llama4"  # softcap and sinks transformers has in its eager attention alone; float32 inside

CONFIGS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED)),
    "mistral with a window": (transformers.MistralForCausalLM, transformers.MistralConfig(**GROUPED, sliding_window=4)),
    "qwen2 with a window": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=3, layer_types=HYBRID),
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(
            **GROUPED, sliding_window=5, attn_logit_softcapping=0.5, query_pre_attn_scalar=5, layer_types=HYBRID
        ),
    ),
    "gpt_oss": (  # with sinks
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig(
            **GROUPED, sliding_window=5, layer_types=HYBRID, num_local_experts=2, num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "llama4": (  # with chunks
        transformers.Llama4ForCausalLM,
        transformers.Llama4TextConfig(
            **GROUPED, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=4,
            layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], attn_temperature_tuning=False,
        ),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0,
                                embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0),
    ),
    "bert": (
        transformers.BertModel,
        transformers.BertConfig(**ENCODER, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
    "modernbert": (
        transformers.ModernBertModel,
        transformers.ModernBertConfig(**ENCODER, local_attention=6, layer_types=HYBRID, **dict.fromkeys(SPECIAL, 0)),
    ),
}  # fmt: skip


def build(name, dtype=torch.float64, attention="eager"):
    """The same model at every call, its weights large enough that attention is far from uniform."""
    kind, config = CONFIGS[name]
    torch.manual_seed(3)
    model = kind._from_config(type(config)(**config.to_dict()), attn_implementation=attention, dtype=torch.float64)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the only one for float64
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for x in model.parameters():
            x += 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return model.to(dtype).train()


ENDS = torch.tensor([0, 4, 5, 13])  # of packed documents
PACKED = (
    "llama",
    "mistral with a window",
    "qwen2 with a window",
    "gpt_oss",
)  # what shows its position ids to attention


def packed_batch():
    """One entry of three documents, as transformers' collator that packs makes it."""
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(ENDS.tolist())])[None]
    ends = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 8, "max_length_k": 8}
    return {"input_ids": draw_ids(1), "position_ids": positions}, ends


def draw_ids(batch=2, length=13, seed=5):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, attention, **batch):
    """Logits or states, and the gradient of every parameter for a fixed random weighting of them."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    result = model(**batch)
    return weighed(model, result.logits if hasattr(result, "logits") else result.last_hidden_state)


def run_apart(model, attention, ids):
    """The same for documents packed at ENDS, of which the model sees one at a time."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    return weighed(model, torch.cat([model(input_ids=ids[:, i:j]).logits for i, j in pairwise(ENDS.tolist())], 1))


def weighed(model, out):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    return out.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
