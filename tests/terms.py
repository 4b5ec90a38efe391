"""Biases, masks and soft caps for fused kernels, and dense attention in float64 to hold them against, on any device."""

import torch

import ringcore
from ringcore.dropout import kept_weights
from ringcore.values import Score

INF = float("inf")
OUT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest |v|
GRADIENT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest entry, or of 1


def _random(generator, *shape):
    return torch.randn(shape, generator=generator, device=generator.device)


def _hiding(generator, *shape):
    """A bias with -inf here and there and in one whole row."""
    bias = _random(generator, *shape)
    bias[torch.rand(shape, generator=generator, device=generator.device) < 0.3] = -INF
    bias[:, :, shape[2] // 2] = -INF
    return bias


def _mask(generator, *shape):
    """A mask with one row that sees nothing and one key that nobody sees, if it has several."""
    mask = torch.rand(shape, generator=generator, device=generator.device) < 0.6
    if shape[2] > 1:
        mask[:, :, shape[2] // 3] = False
    if shape[3] > 1:
        mask[..., shape[3] // 3] = False
    return mask


def _lowest(generator, *shape):
    """The most negative number where hidden, and whole rows of it, as masks of model libraries have it."""
    hidden = torch.rand(shape, generator=generator, device=generator.device) < 0.4
    hidden[:, :, shape[2] // 2] = True
    return torch.zeros(shape, device=generator.device).masked_fill(hidden, torch.finfo(torch.float32).min)


def terms(name, generator, batch, heads, rows, keys):
    """The keywords of a call by the name of what is in it."""
    g = generator
    return {
        "nothing": lambda: {},
        "causal": lambda: {"causal": True},
        "bias": lambda: {"bias": _random(g, batch, heads, rows, keys)},
        "bias with -inf": lambda: {"bias": _hiding(g, batch, heads, rows, keys)},
        "bias of finfo.min": lambda: {"bias": _lowest(g, batch, 1, rows, keys), "causal": True},
        "bias for all heads": lambda: {"bias": _hiding(g, batch, 1, rows, keys), "causal": True},
        "bias for the whole batch": lambda: {"bias": _random(g, heads, rows, keys)},
        "bias of keys": lambda: {"bias": _random(g, batch, 1, 1, keys)},
        "bias of rows": lambda: {"bias": _random(g, 1, heads, rows, 1), "causal": True},
        "bias of heads": lambda: {"bias": _random(g, heads, 1, 1)},
        "mask": lambda: {"mask": _mask(g, batch, heads, rows, keys)},
        "mask for all": lambda: {"mask": _mask(g, 1, 1, rows, keys), "causal": True},
        "mask of keys": lambda: {"mask": _mask(g, batch, 1, 1, keys), "window": (40, 30)},
        "mask of rows": lambda: {"mask": _mask(g, batch, heads, rows, 1)},
        "softcap": lambda: {"softcap": 1.5, "causal": True},
        "everything": lambda: {
            "bias": _hiding(g, 1, heads, rows, keys), "mask": _mask(g, batch, 1, rows, keys), "softcap": 2.5,
            "scale": 0.7, "causal": True, "window": (40, 20), "query_offset": [3 * entry + 1 for entry in range(batch)],
            "key_lengths": [keys - 2 * entry for entry in range(batch)],
        },
        "dropout": lambda: {"dropout": 0.3, "dropout_seed": (1 << 63) + 5, "causal": True},
        "dropout and bias": lambda: {
            "dropout": 0.6, "dropout_seed": 7, "bias": _hiding(g, 1, heads, rows, 1), "mask": _mask(g, batch, 1, 1, keys),
            "softcap": 2.5,
        },
    }[name]()  # fmt: skip


NAMES = (
    "nothing", "causal", "bias", "bias with -inf", "bias of finfo.min", "bias for all heads", "bias for the whole batch",
    "bias of keys", "bias of rows", "bias of heads", "mask", "mask for all", "mask of keys", "mask of rows", "softcap",
    "everything", "dropout", "dropout and bias",
)  # fmt: skip


def _kept(weights, rate, seed):
    """What dropout multiplies whole weights [B, H, S, T] with."""
    sides = [slice(0, length) for length in weights.shape]
    tile = ringcore.Tile(*sides[:2], sides[1], *sides[2:], *((range(length),) for length in weights.shape[2:]))
    return kept_weights(Score(1.0, None, rate, seed), tile, weights, weights.dtype)


def dense(q, k, v, bias, dout, dlse, *, mask=None, softcap=None, scale=None, causal=False, window=(None, None),
          query_offset=0, key_lengths=None, dropout=0.0, dropout_seed=0):  # fmt: skip
    """out, lse and the gradients of q, k, v and bias, by autograd through whole float64 matrices."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, bias)]
    q, k, v, bias = leaves
    batch, heads, rows, width = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    offsets = torch.as_tensor(query_offset, device=q.device).expand(batch)[:, None, None, None]
    distance = torch.arange(keys, device=q.device) - torch.arange(rows, device=q.device)[:, None] - offsets
    hidden = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
    if causal:
        hidden |= distance > 0
    if window[0] is not None:
        hidden |= (distance < -window[0]) | (distance > window[1])
    if key_lengths is not None:
        lengths = torch.as_tensor(key_lengths, device=q.device)[:, None, None, None]
        hidden |= torch.arange(keys, device=q.device) >= lengths
    if mask is not None:
        hidden |= ~mask
    if bias is not None:
        hidden |= bias == -INF
        scores = scores + bias.masked_fill(bias == -INF, 0.0)
    empty = hidden.all(-1)
    scores = scores.masked_fill(hidden & ~empty[..., None], -INF)
    top = scores.detach().amax(-1, keepdim=True)
    powers = torch.exp(scores - top).masked_fill(empty[..., None], 0.0)
    total = powers.sum(-1, keepdim=True).masked_fill(empty[..., None], 1.0)
    weights = powers / total
    if dropout:
        weights = weights * _kept(weights, dropout, dropout_seed)
    out = weights @ v.repeat_interleave(group, 1)
    lse = (top + torch.log(total))[..., 0].masked_fill(empty, 0.0)  # logsumexp's own gradient loses the total to top
    cotangents = [dout.double(), dlse.double().masked_fill(empty, 0.0)]
    gradients = torch.autograd.grad([out, lse], [x for x in leaves if x is not None], cotangents)
    return out.detach(), lse.detach().masked_fill(empty, -INF), gradients


def check(
    kernels, device, dtype, shape, name, size=1, layout="contiguous", bias_dtype=None, memory="bhsd", poison=False
):
    """One call and its gradients against `dense`. poison: NaN in k and v of the key that no row sees."""
    batch, heads, key_heads, rows, keys, width, values = shape
    generator = torch.Generator(device).manual_seed(len(name))
    sizes = (batch, heads, rows, width), (batch, key_heads, keys, width), (batch, key_heads, keys, values)
    q, k, v = (_random(generator, *x).to(dtype) for x in sizes)
    dout = _random(generator, batch, heads, rows, values).to(dtype)
    dlse = _random(generator, batch, heads, rows)
    if memory == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    keywords = terms(name, generator, batch, heads, rows, keys)
    bias = keywords.pop("bias", None)
    if bias is not None:
        bias = bias.to(bias_dtype or dtype)
        bias = bias.clamp(min=torch.finfo(bias.dtype).min).where(bias != -INF, -INF)
    due, due_lse, expected = dense(q, k, v, bias, dout, dlse, **keywords)
    if poison:
        k[:, :, keys // 3], v[:, :, keys // 3] = torch.nan, torch.nan
    given = {"q": q, "k": k, "v": v} if bias is None else {"q": q, "k": k, "v": v, "bias": bias}
    (out, lse), pullback = ringcore.ring_attention_vjp(
        **given, wrt=tuple(given), kernels=kernels, ring_size=size, layout=layout, **keywords
    )
    came = pullback(dout, dlse)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    largest = v.nan_to_num().abs().max() / (1.0 - keywords.get("dropout", 0.0))  # what weights are made larger by
    assert float((out.double() - due).abs().max() / largest) < OUT[dtype]
    seen = due_lse > -INF
    assert (lse[~seen] == -INF).all()
    assert (out[~seen] == 0).all()
    # A score adds up as many products as q and k are wide, and a row may see one key alone.
    close = 2e-6 * max(1.0, (width / 64) ** 0.5)
    assert ((lse[seen].double() - due_lse[seen]).abs() < close * due_lse[seen].abs().clamp(min=1)).all()
    for x, mine, whole in zip(given.values(), came, expected, strict=True):
        assert mine.dtype == x.dtype
        assert mine.shape == x.shape
        error = float((mine.double() - whole).abs().max() / whole.abs().max().clamp(min=1))
        assert error < max(GRADIENT[dtype], GRADIENT.get(x.dtype, 0.0)), f"off by {error:.1e}"


def check_nan(kernels, device):
    """NaN in a row of q shows in that row, in a key that all see everywhere."""
    generator = torch.Generator(device).manual_seed(4)
    q, k, v = (_random(generator, 1, 2, 70, 16) for _ in range(3))
    mask = _mask(generator, 1, 1, 70, 70)
    poisoned = q.clone()
    poisoned[:, :, 3] = torch.nan
    others = [row for row in range(70) if row != 3]
    due = ringcore.ring_attention(q, k, v, mask=mask, kernels=kernels)
    out, lse = ringcore.ring_attention(poisoned, k, v, mask=mask, kernels=kernels, return_lse=True, ring_size=2)
    assert out[:, :, 3].isnan().all()
    assert lse[:, :, 3].isnan().all()
    torch.testing.assert_close(out[:, :, others], due[:, :, others], atol=2e-6, rtol=0)
    for name in ("k", "v"):
        given = {"k": k.clone(), "v": v.clone()}
        given[name][:, :, 5] = torch.nan
        assert ringcore.ring_attention(q, **given, kernels=kernels).isnan().all()
