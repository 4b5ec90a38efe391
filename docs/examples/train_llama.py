"""Train a small Llama-type model from scratch on real text, each sequence split over the ranks of a ring.

    python docs/examples/train_llama.py --json one.json                              # the reference: one process, sdpa
    torchrun --nproc-per-node 2 docs/examples/train_llama.py --json two.json         # the same run on a ring of 2
    torchrun --nproc-per-node 8 docs/examples/train_llama.py --device cuda --dtype bfloat16 --length 65536

The text is CPython's own help (`pydoc_data.topics`), its bytes are the vocabulary. All ranks hold the whole model and
read the same batches; each runs its own positions of them. The printed loss is the mean over all ranks' tokens.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

try:
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    import ringcore_transformers
except ImportError as error:
    sys.exit(f'{error}. This example needs:\n    pip install "ringcore[transformers]"')


def read_options():
    """The options; --attention depends on how many processes there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="training steps (default 50)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (default 1024)")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a batch (default 2)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of AdamW (default 1e-3)")
    parser.add_argument("--layout", default="zigzag", help="who holds which positions (default zigzag)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="gloo or NCCL (default cpu)")
    parser.add_argument("--attention", help="default: ringcore on several processes, sdpa on one")
    parser.add_argument("--json", type=Path, help="write the loss of every step to this file")
    return parser.parse_args()


def batches(options, device):
    """Batches [B, N] of consecutive bytes of the text, from its start again when it ends."""
    from pydoc_data.topics import topics

    text = torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()), device=device)
    size = options.batch * options.length
    for step in range(options.steps):
        ids = text[torch.arange(step * size, (step + 1) * size, device=device) % len(text)]
        ids = ids.reshape(options.batch, options.length)
        yield {"input_ids": ids, "labels": ids}


def build(options, device):
    """The same random model on every rank."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=options.length, attn_implementation=options.attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device).train()


def train(options, ring, rank, size, device):
    """The loss of every step."""
    model = build(options, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    narrow = options.dtype != "float32"
    autocast = torch.autocast(device.type, torch.bfloat16) if narrow else contextlib.nullcontext()
    losses = []
    for step, batch in enumerate(batches(options, device)):
        part = ringcore_transformers.split_batch(batch, options.layout, rank, size)
        labels = part.pop("shift_labels")
        with autocast:
            logits = model(**part, use_cache=False).logits
        loss = ringcore_transformers.loss(logits, labels, ring)
        optimizer.zero_grad()
        loss.backward()
        ringcore_transformers.sum_gradients(model.parameters(), ring)
        optimizer.step()
        losses.append(loss.item())
        if rank == 0:
            print(f"step {step + 1:4d}  loss {losses[-1]:.6f}", flush=True)
    return losses


def main():
    """Join the ring if there is one, train, write the losses."""
    options = read_options()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    options.attention = options.attention or ("ringcore" if size > 1 else "sdpa")
    device, ring = torch.device(options.device), None
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        ring = dist.group.WORLD
    ringcore_transformers.register(ring=ring, layout=options.layout)
    try:
        losses = train(options, ring, rank, size, device)
    finally:
        if ring is not None:
            dist.destroy_process_group()
    if options.json and rank == 0:
        run = {name: str(x) if isinstance(x, Path) else x for name, x in vars(options).items()}
        options.json.write_text(json.dumps({**run, "ranks": size, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
