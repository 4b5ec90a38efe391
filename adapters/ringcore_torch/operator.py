"""Attention as one Torch operator, which autograd differentiates and torch.compile sees as one node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

from ringcore import Inputs, Result, UnsupportedError, check_output_gradients
from ringcore_torch.keywords import call_of, objects_of, text_of
from ringcore_torch.partials import finished_lse

Tensor = torch.Tensor


def attend(inputs: Inputs, *, return_lse: bool, **keywords: Any) -> Any:
    """`ringcore.ring_attention` on tensors: (out, lse) or out, with gradients where an input requires them.

    NotImplemented, where the arguments are such that `ringcore.ring_attention` must refuse them.
    """
    q, given = inputs.q, [x for x in inputs if x is not None]
    if type(return_lse).__name__ not in ("bool", "bool_") or not all(_takes(x, q.device) for x in given):
        return NotImplemented
    if any(isinstance(x, Tensor) and x.requires_grad for x in (inputs.alibi, *keywords.values())):
        return NotImplemented
    if torch.compiler.is_compiling():
        _refuse_numbers_in_arrays(keywords)
    else:
        _refuse_transforms(given)
    named = inputs._asdict()
    wrt = [name for name, x in named.items() if x is not None and x.requires_grad and torch.is_grad_enabled()]
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows = {name: named[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")}
        inputs = inputs._replace(**{name: x if x is None else _cast(x, dtype) for name, x in rows.items()})
    text = text_of(**keywords, wrt=wrt)
    if not _plain(given):
        out, lse, _, _ = torch.ops.ringcore.attend(*inputs, text)
    elif wrt:
        out, lse, _, _ = _Recorded.apply(*inputs, text)  # type: ignore[no-untyped-call]
    else:
        out, result = _run(inputs, text)
        lse = finished_lse(result.maximum, result.total, -torch.inf) if return_lse else None
    return (out, lse) if return_lse else out


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody but autograd would see the operator: no compiler, no mode that watches operators."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return not watched and all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast converts it."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _run(inputs: Inputs, text: str) -> tuple[Tensor, Result]:
    """out in the caller's axes, its memory ordered as q's, and what else was found."""
    call = call_of("ring_attention", text)
    with _uncast(inputs.q):
        result = call.prepare(_detached(inputs)).forward()
    out = result.out if call.axes == "bhsd" else result.out.transpose(1, 2)
    return _with_strides(_out_strides(inputs.q, inputs.v), out), result


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, alibi: Tensor | None, keywords: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, lse, maximum and total."""
    out, result = _run(Inputs(q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi), keywords)
    maximum, total = result.maximum.contiguous(), result.total.contiguous()
    return out, finished_lse(maximum, total, -torch.inf), maximum, total


_attend = torch.library.custom_op("ringcore::attend", _forward, mutates_args=())


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None,
    prefix_k: Tensor | None, prefix_v: Tensor | None, alibi: Tensor | None, keywords: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    axes = call_of("ring_attention", keywords).axes
    out = q.new_empty_strided((*q.shape[:3], v.shape[3]), _out_strides(q, v))
    rows = q.shape[:3] if axes == "bhsd" else (q.shape[0], q.shape[2], q.shape[1])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse, maximum, total = (q.new_empty(rows, dtype=wide) for _ in range(3))
    return out, lse, maximum, total


def _backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    mask: Tensor | None, sinks: Tensor | None, prefix_k: Tensor | None, prefix_v: Tensor | None, alibi: Tensor | None,
    out: Tensor, maximum: Tensor, total: Tensor, keywords: str, wrt: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of the names in ``wrt``."""
    names = tuple(wrt.split())
    call = call_of("the gradient of ring_attention", keywords, wrt=names)
    if dout is None:
        dout = torch.zeros_like(out)
    dout, dlse, out, maximum, total = map(_without_grad, (dout, dlse, out, maximum, total))
    rows = out if call.axes == "bhsd" else out.transpose(1, 2)
    result = Result(rows, rows, maximum, total)
    inputs = _detached(Inputs(q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi))

    def further(_: Any) -> None:
        check_output_gradients(dout, dlse, out, maximum)

    with _uncast(q):
        found = call.prepare(inputs, further).backward(result, dout, dlse, names)
    return [_stored_as(getattr(inputs, name), x) for name, x in zip(names, found, strict=True)]


_attend_backward = torch.library.custom_op("ringcore::attend_backward", _backward, mutates_args=())


@_attend_backward.register_fake
def _(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    mask: Tensor | None, sinks: Tensor | None, prefix_k: Tensor | None, prefix_v: Tensor | None, alibi: Tensor | None,
    out: Tensor, maximum: Tensor, total: Tensor, keywords: str, wrt: str,
) -> list[Tensor]:  # fmt: skip
    inputs = Inputs(q, k, v, bias, mask, sinks, prefix_k, prefix_v, alibi)
    return [torch.empty_like(getattr(inputs, name)) for name in wrt.split()]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, keywords = inputs
    out, _, maximum, total = output
    ctx.save_for_backward(*tensors, out, maximum, total)
    ctx.keywords, ctx.kept = keywords, objects_of(keywords)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(maximum, total)


def _pull_back(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Any, ...]:
    return _gradients(torch.ops.ringcore.attend_backward, ctx, dout, dlse)


def _gradients(
    backward: Callable[..., list[Tensor]], ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Any, ...]:
    """One gradient, or None, for each input of the operator."""
    wrt = [name for name, needed in zip(Inputs._fields, ctx.needs_input_grad, strict=False) if needed]
    if dout is None and dlse is None:
        return (None,) * (len(Inputs._fields) + 1)
    gradients = backward(dout, dlse, *ctx.saved_tensors, ctx.keywords, " ".join(wrt))
    found = dict(zip(wrt, gradients, strict=True))
    return *(found.get(name) for name in Inputs._fields), None


def _refuse_double(ctx: Any, *_: Any) -> None:
    raise UnsupportedError("ring_attention was differentiated twice; its gradients have no gradient of their own.")


_attend.register_autograd(_pull_back, setup_context=_setup)
_attend_backward.register_autograd(_refuse_double)


class _Recorded(torch.autograd.Function):
    """The operator without its dispatch, which takes the host longer than a short sequence takes a GPU."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """As the operator's."""
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Any, ...]:
        """As the operator's, by which a graph of gradients is recorded: it refuses a second differentiation."""
        return _gradients(torch.ops.ringcore.attend_backward if torch.is_grad_enabled() else _backward, ctx, dout, dlse)


def _takes(x: Any, device: torch.device) -> bool:
    """Whether x can be an argument of an operator: of tensors on several devices Torch would choose one silently."""
    return isinstance(x, Tensor) and x.device == device and x.layout is torch.strided


def _refuse_numbers_in_arrays(keywords: dict[str, Any]) -> None:
    """Raise UnsupportedError for keywords whose numbers a compiled graph would keep as they were when it was traced."""
    for name in ("scale", "softcap", "query_offset", "key_lengths", "documents", "cu_seqlens"):
        x = keywords.get(name)
        if hasattr(x, "tolist"):
            raise UnsupportedError(
                f"{name} is a {type(x).__name__}, whose numbers torch.compile would take from the first call for all "
                "later ones. Give Python numbers, for example with .tolist() outside of what is compiled, or a mask."
            )


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


def _detached(inputs: Inputs) -> Inputs:
    return Inputs(*map(_without_grad, inputs))


def _without_grad(x: Any) -> Any:
    return x.detach() if x is not None and x.requires_grad else x


def _uncast(q: Tensor) -> AbstractContextManager[Any]:
    """What computes in float32 stays in float32: autocast has cast the inputs, and nothing else is its business."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _out_strides(q: Tensor, v: Tensor) -> tuple[int, ...]:
    """How out lies: heads and rows in the order in which q has them."""
    _, first, second, _ = q.shape
    width = v.shape[3]
    if q.stride(1) < q.stride(2):
        return first * second * width, width, first * width, 1
    return first * second * width, second * width, width, 1


def _with_strides(strides: tuple[int, ...], x: Tensor) -> Tensor:
    """x itself if it lies so, else a copy that does: compiled code relies on it."""
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def _stored_as(like: Tensor, x: Tensor) -> Tensor:
    """x in the order of memory of ``like``, without its gaps."""
    last = sum((length - 1) * step for length, step in zip(x.shape, x.stride(), strict=True))
    if x.stride() == like.stride() and last + 1 == x.numel():
        return x
    return _with_strides(torch.empty_like(like).stride(), x)
