"""Generate text with a Hugging Face model whose KV cache lies on all ranks of a ring.

    python docs/examples/generate_ring.py --json one.json                            # one process, transformers alone
    torchrun --nproc-per-node 2 docs/examples/generate_ring.py --json two.json       # the same, half the cache on each
    torchrun --nproc-per-node 2 docs/examples/generate_ring.py --model Qwen/Qwen3-0.6B --prompt "Once upon a time"

Without --model it is a small Llama with random weights that reads bytes: what it says means nothing, but it says that
on any number of ranks. Every rank holds the whole model and generates the same tokens.
"""

import argparse
import json
import os
import sys
from pathlib import Path

try:
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import ringcore_transformers
except ImportError as error:
    sys.exit(f'{error}. This example needs:\n    pip install "ringcore[transformers]"')


def load(options, attention):
    """The same model on every rank, the prompt's tokens [1, N], and what makes text of tokens."""
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=attention)
        return model, tokenizer(options.prompt, return_tensors="pt").input_ids, tokenizer.decode
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, initializer_range=0.2, eos_token_id=None, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.tensor([list(options.prompt.encode())]), bytes


def main():
    """Join the ring if there is one, generate, say what each rank held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal model of the Hugging Face hub, or its folder")
    parser.add_argument("--prompt", default="It is a truth universally acknowledged, that a single man")
    parser.add_argument("--tokens", type=int, default=64, help="how many to generate (default 64)")
    parser.add_argument("--sample", action="store_true", help="draw the tokens; otherwise the likeliest are taken")
    parser.add_argument("--json", type=Path, help="write the tokens and the cache's places to this file")
    options = parser.parse_args()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cache = None
    if size > 1:
        dist.init_process_group("gloo")
        ringcore_transformers.register(ring=dist.group.WORLD)
        cache = ringcore_transformers.RingCache()
    model, ids, decode = load(options, "ringcore" if size > 1 else "sdpa")
    torch.manual_seed(1)  # the same on every rank, so that all draw the same tokens
    made = model.eval().generate(
        ids,
        max_new_tokens=options.tokens,
        do_sample=options.sample,
        past_key_values=cache,
        return_dict_in_generate=True,
    )
    tokens, places = made.sequences[0].tolist(), made.past_key_values.layers[0].keys.shape[2]
    print(f"rank {rank} of {size}: {len(tokens)} tokens, places for {places} of them in each layer", flush=True)
    if rank == 0:
        print(decode(tokens))
    if options.json and rank == 0:
        options.json.write_text(json.dumps({"tokens": tokens, "places": places, "ranks": size}) + "\n")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
