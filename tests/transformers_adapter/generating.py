"""What is generated, by transformers alone in one process or over a RingCache, and how."""

import torch
from models import EAGER, build, draw_ids

NEW = 15  # tokens
MODELS = ["llama", "mistral with a window", "qwen2 with a window", "gemma2", "gpt_oss", "gpt2"]
PROMPTS = {"of 13": (13, 13), "of 1": (1, 1), "padded": (9, 4, 9, 1)}  # the tokens of each batch entry
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "by beams": {"num_beams": 3, "num_return_sequences": 2},
    "from a prompt in chunks": {"prefill_chunk_size": 4},
    "guessed from the prompt": {"prompt_lookup_num_tokens": 3, "eos_token_id": 0},
    "guessed by an assistant": {"assistant_model": "llama"},
}
ONE_ENTRY = ("guessed from the prompt", "guessed by an assistant")  # all that transformers' guessing takes
CASES = {
    **{(model, prompt, "greedy"): WAYS["greedy"] for model in MODELS for prompt in PROMPTS},
    **{(model, "padded", way): WAYS[way] for model in ("llama", "mistral with a window") for way in WAYS},
}


def oracle(name):
    """Transformers' own attention for this model, and a dtype in which it makes no NaN of padding."""
    return ("eager", torch.float32) if name in EAGER else ("sdpa", torch.float64)


def prepare(name, prompt, way):
    """The model, and what `generate` gets."""
    model = build(name, oracle(name)[1]).eval()
    lengths = torch.tensor(PROMPTS[prompt])[: 1 if way in ONE_ENTRY else None]
    longest = int(lengths.max())
    ids = draw_ids(len(lengths), longest)
    if way == "guessed from the prompt":
        ids = ids[:, : longest // 2].repeat(1, 3)[:, :longest]  # something to find again
    batch = {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths[:, None]).long()}
    keywords = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **WAYS[way]}
    if "assistant_model" in keywords:
        keywords["assistant_model"] = build(keywords["assistant_model"], attention="sdpa").eval()
        keywords["assistant_model"].generation_config.eos_token_id = None
    return model, {**batch, **keywords}


def generate(model, attention, seed=7, **keywords):
    """Tokens [B, N]."""
    model.set_attn_implementation(attention)
    torch.manual_seed(seed)
    return model.generate(**keywords)


def due(name, prompt, way):
    """The tokens by transformers alone, with its DynamicCache."""
    model, keywords = prepare(name, prompt, way)
    return generate(model, oracle(name)[0], **keywords)


def poison(like, *shape, **keywords):
    """In the place of `torch.Tensor.new_empty`: what nobody has written is NaN."""
    return like.new_full(*shape, float("nan") if like.is_floating_point() else 0, **keywords)
