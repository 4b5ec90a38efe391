"""One rank of a scenario: python world.py SCENARIO FOLDER, with RANK and WORLD_SIZE in the environment."""

import os
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out
from generating import CASES, generate, poison, prepare
from models import CONFIGS, PACKED, build, draw_ids, packed_batch
from training import STEPS, batches, start, step

import ringcore
import ringcore_transformers
from ringcore_transformers import RingCache, cache_layer, loss, split_batch, sum_gradients

PADDED = [(13, 6, 1), (13, 8, 12)]  # the tokens of each batch entry
LAYOUTS = ["contiguous", "zigzag", "striped"]


def models(group, rank, size):
    """Every model with every layout: this rank's logits or states, and the sum of gradients."""
    found = {}
    for layout in LAYOUTS:
        ringcore_transformers.register("ring", ring=group, layout=layout)
        for name in CONFIGS:
            model = build(name)
            model.set_attn_implementation("ring")
            part = split_batch({"input_ids": draw_ids()}, layout, rank, size)
            result = model(**part)
            out = result.logits if hasattr(result, "logits") else result.last_hidden_state
            weights = torch.randn((2, 13, out.shape[2]), generator=torch.Generator().manual_seed(6), dtype=out.dtype)
            (out * ringcore.shard(weights, layout, rank, size, axis=1)).sum().backward()
            sum_gradients(model.parameters(), group)
            gradients = {n: x.grad for n, x in model.named_parameters()}
            found[layout, name] = out.detach(), gradients
    return found


def packed(group, rank, size):
    """Packed documents: this rank's logits, the sum of gradients, and what other ends on one rank are."""
    found = {}
    for layout, name in product(LAYOUTS, PACKED):
        ringcore_transformers.register("ring", ring=group, layout=layout)
        model, (batch, ends) = build(name), packed_batch()
        model.set_attn_implementation("ring")
        part = split_batch({**batch, **ends}, layout, rank, size)
        out = model(**part).logits
        weights = torch.randn((1, 13, out.shape[2]), generator=torch.Generator().manual_seed(6), dtype=out.dtype)
        (out * ringcore.shard(weights, layout, rank, size, axis=1)).sum().backward()
        sum_gradients(model.parameters(), group)
        found[layout, name] = out.detach(), {n: x.grad for n, x in model.named_parameters()}
    other = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 13]))
    try:
        model(**{**part, **(other if rank else {})})
    except ringcore.RingcoreError as error:
        found["other ends"] = type(error).__name__, str(error)
    return found


def padding(group, rank, size):
    """Padding on the right, with a rank that has none of it, and one that has nothing else."""
    found = {}
    for layout, lengths in product(LAYOUTS, PADDED):
        mask = (torch.arange(13) < torch.tensor(lengths)[:, None]).long()
        ringcore_transformers.register("ring", ring=group, layout=layout)
        for name in ("llama", "bert"):
            model = build(name)
            model.set_attn_implementation("ring")
            result = model(**split_batch({"input_ids": draw_ids(3), "attention_mask": mask}, layout, rank, size))
            out = result.logits if hasattr(result, "logits") else result.last_hidden_state
            found[layout, lengths, name] = out.detach()
    return found


def training(group, rank, size):
    """Ten steps; the loss and the gradients of each."""
    found = {}
    for layout in ("contiguous", "zigzag"):
        ringcore_transformers.register("ring", ring=group, layout=layout)
        model, optimizer = start("ring")
        found[layout] = [step(model, optimizer, split_batch(batch, layout, rank, size), group) for batch in batches()]
        assert len(found[layout]) == STEPS
    return found


def averages(group, rank, size):
    """The loss, and gradients under what is not the helper."""
    ids = draw_ids()
    logits = torch.randn(2, 13, 61, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.where(torch.arange(13) < 9, ids, -100)  # the last rank predicts little
    part = split_batch({"labels": labels, "inputs_embeds": logits}, "contiguous", rank, size)
    mine = part["inputs_embeds"].requires_grad_()
    value = loss(mine, part["shift_labels"], group)
    value.backward()
    idle = torch.nn.Parameter(torch.ones(3))
    if rank:
        idle.grad = torch.full((3,), 2.0)
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    sum_gradients([idle, frozen], group)
    return {"value": value.detach(), "gradient": mine.grad, "idle": idle.grad, "frozen": frozen.grad}


def refusals(group, rank, size):
    """What goes wrong on one rank is an error on both, and the ring can be used again."""
    ringcore_transformers.register("ring", ring=group)
    model, found = build("llama"), {}
    model.set_attn_implementation("ring")
    good = split_batch({"input_ids": draw_ids()}, "contiguous", rank, size)
    ids = good["input_ids"]
    mask = torch.ones(2, 13).long()
    holes = mask.clone()
    holes[1, 2] = 0
    other = split_batch({"input_ids": draw_ids()}, "zigzag", rank, size)
    cases = {
        "position ids left out": {"input_ids": ids},
        "position ids of another layout": other,
        "padding on the left": split_batch(
            {"input_ids": draw_ids(), "attention_mask": holes}, "contiguous", rank, size
        ),
        "a whole mask": {**good, "attention_mask": mask},
        "another batch": {name: x[: 2 - rank] for name, x in good.items()},
        "a keyword on one rank": {**good, "head_mask": torch.ones(4) if rank else None},
    }
    for name, batch in cases.items():
        try:
            model(**batch)
            found[name] = "nothing", ""
        except ringcore.RingcoreError as error:
            found[name] = type(error).__name__, str(error)
    found["again"] = model(**good).logits.detach()
    found["mask on one rank alone"] = model(
        **good, **({"attention_mask": torch.ones_like(ids)} if rank else {})
    ).logits.detach()
    return found


def mesh(group, rank, size):
    """A ring given as a device mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    line = init_device_mesh("cpu", (size,))
    ringcore_transformers.register("ring", ring=line, layout="zigzag")
    model, optimizer = start("ring")
    return step(model, optimizer, split_batch(next(iter(batches())), "zigzag", rank, size), line)


def generation(group, rank, size):
    """Every case of generating: the tokens, and how many places this rank has for them in each layer."""
    ringcore_transformers.register("ring", ring=group, layout="zigzag")  # which a cache does not care for
    found = {}
    with patch.object(torch.Tensor, "new_empty", poison):
        for case in CASES:
            model, keywords = prepare(*case)
            cache = RingCache()
            tokens = generate(model, "ring", **keywords, past_key_values=cache)
            found[case] = tokens, cache.get_seq_length(), [layer.keys.shape[2] for layer in cache.layers]
    return found


def generation_scores(group, rank, size):
    """Logits of every step, and tokens of a second call that goes on from the first one's cache."""
    ringcore_transformers.register("ring", ring=group)
    model, keywords = prepare("llama", "padded", "sampled")
    cache = RingCache()
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    came = generate(model, "ring", **keywords, **wanted, past_key_values=cache)
    more = torch.cat([came.sequences, draw_ids(4, 3, seed=8)], 1)
    mask = torch.nn.functional.pad(keywords["attention_mask"], (0, more.shape[1] - 9), value=1)
    again = {**keywords, "input_ids": more, "attention_mask": mask}
    return torch.stack(came.logits), more, generate(model, "ring", **again, past_key_values=cache)


def generation_refusals(group, rank, size):
    """What is wrong when generating, on one rank or between them, is an error on both, and leaves the cache empty."""
    ringcore_transformers.register("ring", ring=group)
    model, keywords = prepare("llama", "padded", "greedy")
    ids, mask = keywords["input_ids"], keywords["attention_mask"]
    model.set_attn_implementation("ring")
    used = RingCache()
    with torch.no_grad():
        model(input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=used)
    cases = {
        "other prompts": {"input_ids": (ids + rank) % 61},
        "other last tokens": {"input_ids": torch.cat([ids[:, :-1], (ids[:, -1:] + rank) % 61], 1)},
        "other seeds": {"do_sample": True, "top_k": 0, "temperature": 1.5, "seed": rank},
        "a longer prompt": {name: x[:, rank:] for name, x in (("input_ids", ids), ("attention_mask", mask))},
        "other padding": {"attention_mask": mask.index_fill(0, torch.tensor([1]), 1) if rank else mask},
        "padding on the right on one rank": {"attention_mask": mask.flip(1) if rank else mask},
        "a used cache on one rank": {"past_key_values": used} if rank else {},
        "a keyword on one rank": {"output_attentions": bool(rank)},
        "no cache": {"past_key_values": None, "attention_mask": torch.ones_like(mask)},
    }
    found = {}
    for name, changed in cases.items():
        cache = RingCache()
        try:
            generate(model, "ring", **{**keywords, "past_key_values": cache, **changed})
            found[name] = "nothing", "", cache.get_seq_length()
        except ringcore.RingcoreError as error:
            found[name] = type(error).__name__, str(error), cache.get_seq_length()
    found["again"] = generate(model, "ring", **keywords, past_key_values=RingCache())
    full = patch.object(cache_layer, "_moved", side_effect=MemoryError("nothing left"))
    try:
        with full if rank else nullcontext():
            generate(model, "ring", **keywords, past_key_values=RingCache())
    except Exception as error:
        found["no memory on one rank"] = type(error).__name__, str(error)
    return found


if __name__ == "__main__":
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.save(globals()[scenario](dist.group.WORLD, rank, size), folder / f"{rank}.pt")
    dist.destroy_process_group()
    # The results are there. Torch's threads, which have ended a process with an abort as Python went, are not tested here.
    os._exit(0)
