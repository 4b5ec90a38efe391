"""Other packages' dilated attention, to be timed beside ours: their modules as they are, over stand-ins for kernels.

dilated-attention-pytorch calls xformers, torchscale's (in the package index as torchscale-gml) flash_attn 2. Neither is
needed here: `install` puts modules in their places that compute with any of `KERNELS`, so that these packages run as
fast as the best kernel lets them. What their dilated attention does not ask for is refused.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from gpu import Attend, Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, bool, float | None], tuple[Tensor, Tensor]]
Branches = dict[str, list[int]]


def _flash4(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func

    out, lse, *_ = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return out, lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(q, k, v), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse[..., 0] if lse.ndim == 4 else lse


def _flash2(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *_heads_first(q, k, v), 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse


KERNELS: dict[str, dict[str, Kernel]] = {
    "cuda": {"flash-attn-4": _flash4, "cuDNN": _cudnn, "FlashAttention-2": _flash2},
    "cpu": {"torch's flash attention for CPUs": _flash_cpu},
}
"""out [B, S, H, D] and lse [B, H, S] of q, k and v [B, S, H, D], for each kind of device."""

_in_use: list[Kernel] = []


def use(kernel: Kernel) -> None:
    """Let both stand-ins compute with this from now on."""
    _in_use[:] = [kernel]


def install(packages: Path | None) -> None:
    """Put the stand-ins in their places, and the wheels of a folder on the path: wheels can be imported from."""
    if packages is not None:
        sys.path[:0] = [str(wheel.resolve()) for wheel in sorted(packages.glob("*.whl"))]
    xformers, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = _memory_efficient_attention
    ops.LowerTriangularMask, ops.AttentionOp = LowerTriangularMask, object
    xformers.ops, xformers.__path__ = ops, []
    sys.modules |= {"xformers": xformers, "xformers.ops": ops}
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_func = _flash_attn_func
    try:
        import flash_attn  # flash-attn-4 lives there, as flash_attn.cute
    except ImportError:
        flash_attn = ModuleType("flash_attn")
        flash_attn.__path__ = []
        sys.modules["flash_attn"] = flash_attn
    flash_attn.flash_attn_interface = interface
    sys.modules["flash_attn.flash_attn_interface"] = interface


class LowerTriangularMask:
    """xformers' name for causal."""


def _memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: LowerTriangularMask | None = None, p: float = 0.0,
    scale: float | None = None, op: None = None,
) -> Tensor:  # fmt: skip
    """xformers': out [B, S, H, D]."""
    if p or op is not None or not (attn_bias is None or isinstance(attn_bias, LowerTriangularMask)):
        raise NotImplementedError("the stand-in for xformers has no p, no op and no bias but LowerTriangularMask")
    return _in_use[0](query, key, value, attn_bias is not None, scale)[0]


def _flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    *, return_attn_probs: bool = False,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """flash_attn 2's: out [B, S, H, D], lse [B, H, S], which has no gradient there either, and None."""
    if dropout_p or not return_attn_probs:
        raise NotImplementedError("the stand-in for flash_attn has no dropout, and always gives lse")
    out, lse = _in_use[0](q, k, v, causal, softmax_scale)
    return out, lse.detach(), None


@dataclass(frozen=True)
class Peer:
    """One way to call a package.

    make: its causal attention of q, k and v [1, N, H, D], given branches, H, D and a device. heads: in how many heads
    each branch sees pairs, given the branches and H. head_offset: ringcore's word for whose offsets it is nearest to.
    promises: what it computes, in words.
    """

    package: str
    make: Callable[[Branches, int, int, str], Attend]
    heads: Callable[[Branches, int], list[int]]
    head_offset: str
    promises: str

    @property
    def version(self) -> str:
        """That of its distribution, which a wheel on the path has too."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "unknown"


def _fkodom(branches: Branches, heads: int, width: int, device: str) -> Attend:
    module = importlib.import_module("dilated_attention_pytorch.dilated_attention")
    attention = module.DilatedAttention(**branches)
    return lambda q, k, v: attention(q, k, v, is_causal=True)


def _fkodom_all_heads(branches: Branches, heads: int, width: int, device: str) -> Attend:
    module = importlib.import_module("dilated_attention_pytorch.dilated_attention")
    # A module whose one branch takes all rows and heads adds to a view of everything, which autograd refuses: those
    # heads are given to two branches.
    parts = [
        module.DilatedAttention([w] * (1 + (r == 1)), [r] * (1 + (r == 1)))
        for w, r in zip(*branches.values(), strict=True)
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = parts[0](q, k, v, is_causal=True)
        for part in parts[1:]:
            out = out + part(q, k, v, is_causal=True)
        return out / len(parts)

    return attend


def _groups(branches: Branches, heads: int) -> list[int]:
    """How many heads dilated-attention-pytorch gives each branch: the rest of a division goes to the first ones."""
    count = len(branches["dilation_rates"])
    return [heads // count + (place < heads % count) for place in range(count)]


def _all_heads(branches: Branches, heads: int) -> list[int]:
    return [heads] * len(branches["dilation_rates"])


def _torchscale(branches: Branches, heads: int, width: int, device: str) -> Attend:
    # At its import the package asks for a GPU, and takes flash_attn only then: with the stand-in it runs anywhere.
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        module = importlib.import_module("torchscale.component.dilated_attention")
    given = SimpleNamespace(
        multiway=False, xpos_rel_pos=False, flash_attention=True, layernorm_eps=1e-5, seq_parallel=False,
        segment_length=branches["segment_lengths"], dilated_ratio=branches["dilation_rates"],
    )  # fmt: skip
    attention = module.DilatedAttention(given, heads * width, heads, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):  # attention alone is compared
        setattr(attention, name, torch.nn.Identity())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention(*(x.flatten(2) for x in (q, k, v)), is_causal=True)[0]
        return out.unflatten(2, (heads, width))

    return attend


PEERS: dict[str, Peer] = {
    "dilated-attention-pytorch": Peer(
        "dilated-attention-pytorch", _fkodom, _groups, "modulo",
        "Each branch has only its share of the heads, all at one offset, place of the branch modulo r; what a branch "
        "gives is divided by its sum over the sequence, and all by the number of branches. Not one softmax. Where heads do "
        "not share out evenly, one head is in two branches and the last in none.",
    ),
    "dilated-attention-pytorch, all heads": Peer(
        "dilated-attention-pytorch", _fkodom_all_heads, _all_heads, "modulo",
        "The same module once for each branch, with all heads, and the mean of what they give: as many pairs as "
        "LongNet's branches have, all heads at offset 0. Each is divided by its sum over the sequence. Not one softmax.",
    ),
    "torchscale": Peer(
        "torchscale-gml", _torchscale, _all_heads, "block",
        "LongNet's mixture, with neighbouring heads at one offset (head_offset='block'); the gradient stops at the "
        "weights of the mixture. Its projections are replaced by the identity.",
    ),
}  # fmt: skip

LEFT_OUT = {
    "longnet 0.5.7": "one branch and no mixture, no heads, positions that are not kept are missing from out, and its "
    "causal mask is laid over out, whose shape it does not fit",
    "torchscale 0.3.0": "has no dilated attention; torchscale-gml 0.2.3 is the source of Microsoft's repository with it",
}
"""Packages of the index that promise dilated attention and cannot be compared, and why."""


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]
