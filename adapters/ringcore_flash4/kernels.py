"""flash-attn-4 on one tile of Torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

from ringcore import Band, Capabilities, Gradients, Partial, Score, Tile, UnsupportedError
from ringcore_flash4.sequences import Sequences

Tensor = torch.Tensor

_LEAST = 9  # compute capability: Hopper


class Flash4:
    """Attention over one tile by the kernels of flash-attn-4, compiled when a kind of tile first comes."""

    capabilities = Capabilities(
        "torch.cuda.flash4", dtypes=frozenset({"float16", "bfloat16"}), libraries=frozenset({"torch"}),
        devices=frozenset({"cuda"}), bias=False, mask=False, fused=True, half_gradients=True, bands="windows",
        parts=True, preference=30, poison_rows=False, largest_head=256, head_multiple=8,
    )  # fmt: skip

    def __init__(self) -> None:
        self._ones: dict[torch.device, Tensor] = {}
        self._sequences = Sequences(self.capturing)

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        return torch.cuda.is_current_stream_capturing()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, score: Score, tile: Tile,
        bias: None = None, mask: None = None, state: None = None,
    ) -> Partial:  # fmt: skip
        """The tile's own partial; see `ringcore.Kernels`."""
        if tile.parts:
            return self._forward_of_parts(q, k, v, score, tile)
        out = _rows_like(q, v.shape[3])
        _, lse, *_ = _flash_attn_fwd(
            *_sequence_first(q, k, v), out=out.transpose(1, 2), softmax_scale=score.scale, softcap=score.softcap or 0.0,
            return_lse=True, **_window(q, k, tile.band),
        )  # fmt: skip
        return Partial(out, lse, self._ones_like(lse))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, maximum: Tensor, total: Tensor, delta: None, *,
        score: Score, tile: Tile, bias: None = None, mask: None = None, into: Gradients, out: Tensor,
        lse: Tensor, dlse: Tensor | None,
    ) -> Gradients:  # fmt: skip
        """The tile's own gradients; see `ringcore.Kernels`."""
        if tile.parts:
            return self._backward_of_parts(dout, q, k, v, score, tile, out, lse, dlse)
        dout, q, k, v, out = _sequence_first(dout, q, k, v, out)
        found = _flash_attn_bwd(
            q, k, v, out, dout, lse, score.scale, softcap=score.softcap or 0.0, dlse=dlse,
            deterministic=torch.are_deterministic_algorithms_enabled(), **_window(q, k, tile.band, axis=1),
        )  # fmt: skip
        return Gradients(*(x.transpose(1, 2) for x in found))

    def _forward_of_parts(self, q: Tensor, k: Tensor, v: Tensor, score: Score, tile: Tile) -> Partial:
        batch, heads, rows, _ = q.shape
        count = self._sequences.equal(tile, rows, k.shape[2])
        given = {
            "softmax_scale": score.scale,
            "softcap": score.softcap or 0.0,
            "return_lse": True,
            **_bounds(tile.band),
        }
        if count:  # entries of a batch, whose ends the kernels need not look for
            # Of several entries, heads before rows, no view has the parts on one axis.
            out = _rows_like(q, v.shape[3]) if batch == 1 else _rows_first(q, v.shape[3])
            _, lse, *_ = _flash_attn_fwd(*_as_entries(count, q, k, v), out=_as_entries(count, out)[0], **given)
            lse = lse.view(batch, count, heads, -1).transpose(1, 2).flatten(2)
        else:
            places = self._sequences.of(tile, batch, rows, k.shape[2], q.device)
            out, lse, *_ = _flash_attn_fwd(*map(_end_to_end, (q, k, v)), **given, **places)
            out = out.view(batch, rows, heads, v.shape[3]).transpose(1, 2)
            lse = lse.view(heads, batch, rows).transpose(0, 1)
        return Partial(out, lse, self._ones_like(lse))

    def _backward_of_parts(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, score: Score, tile: Tile, out: Tensor, lse: Tensor,
        dlse: Tensor | None,
    ) -> Gradients:  # fmt: skip
        batch, _, rows, _ = q.shape
        count = self._sequences.equal(tile, rows, k.shape[2])
        if count:
            arrays, places = _as_entries(count, q, k, v, out, dout), dict[str, Any]()
            lse, dlse = _rows_as_entries(count, lse), None if dlse is None else _rows_as_entries(count, dlse)
        else:
            arrays = [_end_to_end(x) for x in (q, k, v, out, dout)]
            places = self._sequences.of(tile, batch, rows, k.shape[2], q.device)
            lse, dlse = _rows_end_to_end(lse), None if dlse is None else _rows_end_to_end(dlse)
        found = _flash_attn_bwd(
            *arrays, lse, score.scale, softcap=score.softcap or 0.0, dlse=dlse,
            deterministic=torch.are_deterministic_algorithms_enabled(), **places, **_bounds(tile.band),
        )  # fmt: skip
        if count:
            found = [x.flatten(0, 1) for x in found]
        return Gradients(*(x.unflatten(0, (batch, -1)).transpose(1, 2) for x in found))

    def _ones_like(self, lse: Tensor) -> Tensor:
        """One number for all rows. It is kept, because to make it takes as long as the launch of any kernel."""
        if lse.numel() == 1 or self.capturing():
            return torch.ones_like(lse)  # that others may write to, or in the graph's memory, which goes with it
        if lse.device not in self._ones:
            with torch.inference_mode(False):
                one = torch.ones((), dtype=lse.dtype, device="cpu")
                self._ones[lse.device] = one.to(lse.device)  # there before a stream reads it
        return self._ones[lse.device].expand(lse.shape)


def load(sharers: int = 1) -> Flash4:
    """The kernels, where there is a GPU that runs them; the host's cores do not matter to them.

    Raises UnsupportedError if there is none.
    """
    least = min((torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())), default=(0, 0))
    if least[0] < _LEAST:
        raise UnsupportedError(f"flash-attn-4 needs GPUs of compute capability {_LEAST} or more, but there is {least}.")
    return Flash4()


def _sequence_first(*tensors: Tensor) -> list[Tensor]:
    """[B, H, S, D] as [B, S, H, D]; the kernels copy what is not aligned."""
    return [x.transpose(1, 2) for x in tensors]


def _end_to_end(x: Tensor) -> Tensor:
    """[B, H, S, D] as [B * S, H, D]: a view if entries follow each other in memory."""
    return x.transpose(1, 2).flatten(0, 1)


def _rows_end_to_end(x: Tensor) -> Tensor:
    """[B, H, S] as [H, B * S], without gaps."""
    return x.transpose(0, 1).flatten(1).contiguous()


def _as_entries(count: int, *tensors: Tensor) -> list[Tensor]:
    """[B, H, S, D] as [B * count, S / count, H, D], as `_end_to_end`."""
    cut = (x.transpose(1, 2).view(x.shape[0], count, -1, x.shape[1], x.shape[3]) for x in tensors)
    return [x.flatten(0, 1) for x in cut]


def _rows_as_entries(count: int, x: Tensor) -> Tensor:
    """[B, H, S] as [B * count, H, S / count], without gaps."""
    return x.view(*x.shape[:2], count, -1).transpose(1, 2).flatten(0, 1).contiguous()


def _bounds(band: Band) -> dict[str, int | None]:
    """A band that is counted from the lower right corner, as a window."""
    return {"window_size_left": None if band.lo is None else -band.lo, "window_size_right": band.hi}


def _window(q: Tensor, k: Tensor, band: Band, axis: int = 2) -> dict[str, int | None]:
    """The band as a window around a diagonal that ends in the lower right corner."""
    shift = k.shape[axis] - q.shape[axis]
    return {
        "window_size_left": None if band.lo is None else shift - band.lo,
        "window_size_right": None if band.hi is None else band.hi - shift,
    }


def _rows_first(q: Tensor, width: int) -> Tensor:
    """Memory for [B, H, S, width], rows before heads."""
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _rows_like(q: Tensor, width: int) -> Tensor:
    """Memory for [B, H, S, width], heads and rows in the order in which q has them."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        strides = rows * heads * width, width, heads * width, 1
    else:
        strides = rows * heads * width, rows * width, width, 1
    return q.new_empty_strided((batch, heads, rows, width), strides)
