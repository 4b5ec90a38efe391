"""Ten steps of a small Llama in float32: the run that one process and a ring must share."""

import pydoc_data.topics

import torch
import transformers

from ringcore_transformers import loss, sum_gradients

STEPS = 10


def start(attention):
    """A model and an optimizer, the same at every call."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batches():
    """Bytes of a text, 2 times 201 a step: an odd length."""
    text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
    for number in range(STEPS):
        ids = text[number * 402 : (number + 1) * 402].reshape(2, 201)
        yield {"input_ids": ids, "labels": ids}


def step(model, optimizer, part, ring=None):
    """The loss of one step and its gradients; labels are already moved."""
    labels = part.pop("shift_labels")
    optimizer.zero_grad()
    value = loss(model(**part, use_cache=False).logits, labels, ring)
    value.backward()
    sum_gradients(model.parameters(), ring)
    gradients = {name: x.grad.clone() for name, x in model.named_parameters()}
    optimizer.step()
    return value.item(), gradients
