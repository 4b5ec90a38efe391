"""Attention as one Torch operator, which autograd differentiates and torch.compile sees as one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ringcore import Result, UnsupportedError, check_output_gradients
from ringcore_torch.keywords import call_of, text_of

_INPUTS = ("q", "k", "v", "bias")

Tensor = torch.Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, *, return_lse: bool, **keywords: Any
) -> Any:
    """`ringcore.ring_attention` on tensors: (out, lse) or out, with gradients where an input requires them.

    NotImplemented, where the arguments are such that `ringcore.ring_attention` must refuse them.
    """
    given = [q, k, v, *(x for x in (bias, mask) if x is not None)]
    if not isinstance(return_lse, bool) or not all(_takes(x, q.device) for x in given):
        return NotImplemented
    if any(isinstance(x, Tensor) and x.requires_grad for x in keywords.values()):
        return NotImplemented
    if not torch.compiler.is_compiling():
        _refuse_transforms(given)
    inputs = zip(_INPUTS, (q, k, v, bias), strict=True)
    wrt = [name for name, x in inputs if x is not None and x.requires_grad and torch.is_grad_enabled()]
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    out, lse, _, _ = torch.ops.ringcore.attend(q, k, v, bias, mask, text_of(**keywords, wrt=wrt))
    return (out, lse) if return_lse else out


@torch.library.custom_op("ringcore::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, keywords: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = call_of("ring_attention", keywords)
    result = call.prepare(*_detached(q, k, v, bias, mask)).forward()
    out = _stored_as(_empty_out(q, v, call.axes), result.out if call.axes == "bhsd" else result.out.transpose(1, 2))
    # The operator's results must not share memory.
    maximum, total = result.maximum.contiguous(), result.total.contiguous()
    return out, result.lse.contiguous(), maximum, total


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, keywords: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axes = call_of("ring_attention", keywords).axes
    out = _empty_out(q, v, axes)
    rows = q.shape[:3] if axes == "bhsd" else (q.shape[0], q.shape[2], q.shape[1])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse, maximum, total = (q.new_empty(rows, dtype=wide) for _ in range(3))
    return out, lse, maximum, total


@torch.library.custom_op("ringcore::attend_backward", mutates_args=())
def _attend_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    mask: Tensor | None, out: Tensor, maximum: Tensor, total: Tensor, keywords: str, wrt: str,
) -> list[Tensor]:  # fmt: skip
    names = tuple(wrt.split())
    call = call_of("the gradient of ring_attention", keywords, wrt=names)
    if dout is None:
        dout = torch.zeros_like(out)
    dout, dlse, out, maximum, total = _detached(dout, dlse, out, maximum, total)
    rows = out if call.axes == "bhsd" else out.transpose(1, 2)
    result = Result(rows, rows, maximum, total)
    q, k, v, bias, mask = _detached(q, k, v, bias, mask)
    prepared = call.prepare(q, k, v, bias, mask, lambda _: check_output_gradients(dout, dlse, out, maximum))
    found = prepared.backward(result, dout, dlse, names)
    return [_stored_as(_empty_gradient(x, name, call.axes), x) for name, x in zip(names, found, strict=True)]


@_attend_backward.register_fake
def _(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    mask: Tensor | None, out: Tensor, maximum: Tensor, total: Tensor, keywords: str, wrt: str,
) -> list[Tensor]:  # fmt: skip
    axes = call_of("ring_attention", keywords).axes
    inputs = dict(zip(_INPUTS, (q, k, v, bias), strict=True))
    return [_empty_gradient(x, name, axes) for name in wrt.split() if (x := inputs[name]) is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, keywords = inputs
    out, _, maximum, total = output
    ctx.save_for_backward(*tensors, out, maximum, total)
    ctx.keywords = keywords
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(maximum, total)


def _pull_back(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Any, ...]:
    wrt = [name for name, needed in zip(_INPUTS, ctx.needs_input_grad, strict=False) if needed]
    if dout is None and dlse is None:
        return (None,) * 6
    gradients = torch.ops.ringcore.attend_backward(dout, dlse, *ctx.saved_tensors, ctx.keywords, " ".join(wrt))
    found = dict(zip(wrt, gradients, strict=True))
    return *(found.get(name) for name in _INPUTS), None, None


def _refuse_double(ctx: Any, *_: Any) -> None:
    raise UnsupportedError("ring_attention was differentiated twice; its gradients have no gradient of their own.")


_attend.register_autograd(_pull_back, setup_context=_setup)
_attend_backward.register_autograd(_refuse_double)


def _takes(x: Any, device: torch.device) -> bool:
    """Whether x can be an argument of an operator: of tensors on several devices Torch would choose one silently."""
    return isinstance(x, Tensor) and x.device == device and x.layout is torch.strided


def _refuse_transforms(tensors: Sequence[Tensor]) -> None:
    """Raise UnsupportedError under vmap, forward mode and torch.func's transforms."""
    wrapped = [x for x in tensors if torch._C._functorch.is_functorch_wrapped_tensor(x)]
    if any(torch._C._functorch.is_batchedtensor(x) for x in wrapped):
        raise UnsupportedError("ring_attention does not run under vmap. Its batch axis is the first of q, k and v.")
    dual: Any = forward_ad.unpack_dual
    if any(dual(x).tangent is not None for x in tensors):
        raise UnsupportedError("ring_attention has no forward-mode derivative. Use reverse mode: backward().")
    if wrapped:
        raise UnsupportedError(
            "ring_attention does not run under torch.func.grad and the like. Use backward() or torch.autograd.grad."
        )


def _detached(*tensors: Any) -> list[Any]:
    return [None if x is None else x.detach() for x in tensors]


def _empty_out(q: Tensor, v: Tensor, axes: str) -> Tensor:
    """The memory of out: rows of all heads lie together, as the layer after attention reads them."""
    if axes == "bshd":
        return q.new_empty((*q.shape[:3], v.shape[3]))
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[3])).transpose(1, 2)


def _empty_gradient(x: Tensor, name: str, axes: str) -> Tensor:
    """The memory of the gradient of x: as the ring sums it, heads before rows."""
    if name == "bias" or axes == "bhsd":
        return x.new_empty(x.shape)
    batch, rows, heads, width = x.shape
    return x.new_empty((batch, heads, rows, width)).transpose(1, 2)


def _stored_as(memory: Tensor, x: Tensor) -> Tensor:
    """x itself if its strides are those of ``memory``, else copied there: compiled code relies on them."""
    return x if x.stride() == memory.stride() else memory.copy_(x)
