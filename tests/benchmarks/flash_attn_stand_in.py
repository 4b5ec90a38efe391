"""What rings call of flash_attn 2, most of it private functions, over the FlashAttention-2 kernels in torch.

So ring-flash-attn and yunchang run, unmodified, where flash_attn 2 cannot be installed. The kernels are the same; torch returns the
gradients in new memory, so that backward costs a copy of dq, dk and dv more than with flash_attn: at 32,768 positions
on two H100s about 0.3 ms of some 27, by the bytes moved (not measured). What its causal rings do not ask for is refused.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

Tensor = torch.Tensor
__version__ = "2.8.3"  # the release whose arguments the functions take


def install() -> None:
    """Make ``flash_attn`` and ``flash_attn.flash_attn_interface`` have what this module has.

    What else lives in ``flash_attn`` stays importable: flash-attn-4 does, as ``flash_attn.cute``.
    """
    try:
        import flash_attn
    except ImportError:
        flash_attn = ModuleType("flash_attn")
        flash_attn.__path__ = []
        sys.modules["flash_attn"] = flash_attn
    this = sys.modules[__name__]
    flash_attn.flash_attn_interface = this
    flash_attn.flash_attn_func, flash_attn.__version__ = flash_attn_func, __version__
    sys.modules["flash_attn.flash_attn_interface"] = this


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """out [B, S, H, D] of q [B, S, H, D] over k and v [B, T, Hk, D], with gradients."""
    _refuse(dropout_p, softcap, alibi_slopes, deterministic=deterministic, return_attn_probs=return_attn_probs)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _forward(q, k, v, (None, None, q.shape[1], k.shape[1]), scale, causal, _window(*window_size))[0]


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
    """out [B, S, H, D] and lse [B, H, S] of q [B, S, H, D] over k and v [B, T, Hk, D]; None; what dropout drew."""
    _refuse(dropout_p, softcap, alibi_slopes, return_softmax=return_softmax)
    sides = None, None, q.shape[1], k.shape[1]
    return _forward(q, k, v, sides, softmax_scale, causal, _window(window_size_left, window_size_right))


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
    """The same of sequences end to end: out [S, H, D] and lse [H, S] of q [S, H, D] over k and v [T, Hk, D]."""
    _refuse(dropout_p, softcap, alibi_slopes, return_softmax=return_softmax)
    sides = _int32(cu_seqlens_q), _int32(cu_seqlens_k), int(max_seqlen_q), int(max_seqlen_k)
    return _forward(q, k, v, sides, softmax_scale, causal, _window(window_size_left, window_size_right))


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
) -> None:  # fmt: skip
    """Write dq, dk and dv; flash_attn's returns rowsum(dout * out) as well, which nobody reads here."""
    _refuse(dropout_p, softcap, alibi_slopes, deterministic=deterministic)
    sides = None, None, q.shape[1], k.shape[1]
    window = _window(window_size_left, window_size_right)
    _backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), sides, softmax_scale, causal, window)


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False, rng_state: Tensor | None = None,
) -> None:  # fmt: skip
    """The same of sequences end to end."""
    _refuse(dropout_p, softcap, alibi_slopes, deterministic=deterministic)
    sides = _int32(cu_seqlens_q), _int32(cu_seqlens_k), int(max_seqlen_q), int(max_seqlen_k)
    window = _window(window_size_left, window_size_right)
    _backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), sides, softmax_scale, causal, window)


_Sides = tuple[Tensor | None, Tensor | None, int, int]  # where sequences of q and of k end, and the longest


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sides: _Sides, scale: float, causal: bool, window: dict[str, int | None]
) -> tuple[Tensor, Tensor, None, Tensor]:
    out, lse, state, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *sides, 0.0, causal, False, scale=scale, **window
    )
    return out, lse, None, state


def _backward(
    given: tuple[Tensor, ...], into: tuple[Tensor, ...], sides: _Sides, scale: float, causal: bool,
    window: dict[str, int | None],
) -> None:  # fmt: skip
    state = torch.empty(2, dtype=torch.int64, device=given[0].device)  # of dropout: asked for, not read
    found = torch.ops.aten._flash_attention_backward(*given, *sides, 0.0, causal, state, state, scale=scale, **window)
    for memory, x in zip(into, found, strict=True):
        memory.copy_(x)


def _int32(ends: Tensor) -> Tensor:
    return ends.to(torch.int32)


def _refuse(dropout_p: float, softcap: float, alibi_slopes: Tensor | None, **flags: bool) -> None:
    """Raise NotImplementedError for anything but plain attention."""
    given = {"dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes is not None, **flags}
    asked = [name for name, value in given.items() if value]
    if asked:
        raise NotImplementedError(f"the stand-in for flash_attn has no {', '.join(asked)}")


def _window(left: int, right: int) -> dict[str, int | None]:
    """flash_attn writes -1 for no bound, torch None."""
    return {
        "window_size_left": None if left < 0 else left,
        "window_size_right": None if right < 0 else right,
    }
