"""Attention and its gradients through whole float64 matrices, by Torch's autograd."""

from __future__ import annotations

import torch


def dense(
    q, k, v, dout, dlse, *, causal=False, window=(None, None), offset=0, softcap=None, key_lengths=None, bias=None, mask=None
):  # fmt: skip
    """out, lse and the three gradients; rows without keys are 0 and -inf. bias and mask broadcast to [B, H, S, T]."""
    device = q.device
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(k.shape[2], device=device) - torch.arange(q.shape[2], device=device)[:, None] - offset
    left, right = window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance > 0
    if left is not None:
        hidden |= distance < -left
    if right is not None:
        hidden |= distance > right
    hidden = hidden.expand(scores.shape)
    if key_lengths is not None:
        columns = torch.arange(k.shape[2], device=device)
        hidden = hidden | (columns >= torch.tensor(key_lengths, device=device)[:, None, None, None])
    if bias is not None:
        hidden = hidden | (bias == -torch.inf)
        scores = scores + bias.double().masked_fill(bias == -torch.inf, 0.0)
    if mask is not None:
        hidden = hidden | ~mask
    empty = hidden.all(-1)
    scores = scores.masked_fill(hidden & ~empty[..., None], -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(empty[..., None], 0.0)
    out = weights @ v.repeat_interleave(group, 1)
    # Without the largest score, beside which the sum is lost where that is finfo.min: so would be its gradient.
    largest = scores.amax(-1, keepdim=True).detach()
    lse = (largest[..., 0] + torch.logsumexp(scores - largest, -1)).masked_fill(empty, 0.0)
    gradients = torch.autograd.grad([out, lse], (q, k, v), [dout.double(), dlse.double().masked_fill(empty, 0.0)])
    return out.detach(), lse.detach().masked_fill(empty, -torch.inf), gradients
