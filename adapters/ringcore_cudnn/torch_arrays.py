"""The kernels for Torch tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat.torch
import torch

from ringcore import UnsupportedError
from ringcore_cudnn.kernels import CudnnFrontend

Tensor = torch.Tensor

_LEAST = 8  # compute capability: Ampere
_WIDE = 9  # Hopper, where backward too takes heads of 256 columns; elsewhere 128


class TorchArrays:
    """Torch's tensors, streams and caching allocator; see `ringcore_cudnn.Arrays`."""

    xp = array_api_compat.torch

    def __init__(self) -> None:
        self._one: dict[torch.device, Tensor] = {}

    def address(self, x: Tensor) -> int:
        """Where x begins."""
        return x.data_ptr()

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """The strides of x, in elements."""
        return x.stride()

    def empty(self, shape: tuple[int, ...], like: Tensor, dtype: Any = None) -> Tensor:
        """New memory, rows last, on the device of ``like``."""
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)

    def ones(self, like: Tensor) -> Tensor:
        """The number 1 for each of ``like``, in float32: one number, kept for each device."""
        if like.numel() == 1:
            return torch.ones_like(like, dtype=torch.float32)
        one = self._one.get(like.device)
        if one is None:
            if torch.cuda.is_current_stream_capturing():  # in the graph's memory, which goes with it
                return torch.ones((), dtype=torch.float32, device=like.device).expand(like.shape)
            with torch.inference_mode(False):
                one = torch.ones((), dtype=torch.float32, device="cpu").to(like.device)
            self._one[like.device] = one  # there before any stream reads it
        return one.expand(like.shape)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x where the condition holds and y elsewhere, in their dtype."""
        return torch.where(condition, x, y)

    def allocate(self, size: int, like: Tensor) -> tuple[int, Any]:
        """The address of so many bytes, and what keeps them."""
        room = torch.empty(size, dtype=torch.uint8, device=like.device)
        return room.data_ptr(), room

    def device(self, x: Tensor) -> int:
        """The number of the device of x."""
        return x.get_device()

    def stream(self, x: Tensor) -> int:
        """The address of the current stream on the device of x."""
        return int(torch.cuda.current_stream(x.device).cuda_stream)

    def on(self, x: Tensor) -> AbstractContextManager[Any]:
        """A context in which the device of x is the current one."""
        device = x.get_device()
        return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)

    def deterministic(self) -> bool:
        """Whether ``torch.use_deterministic_algorithms`` is on."""
        return torch.are_deterministic_algorithms_enabled()

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        return torch.cuda.is_current_stream_capturing()


def load(sharers: int = 1) -> CudnnFrontend:
    """The kernels, where there are GPUs that run them; the host's cores do not matter to them.

    Raises UnsupportedError if there are none, MissingDependency if there is no cuDNN.
    """
    least = min((torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())), default=(0, 0))
    if least[0] < _LEAST:
        raise UnsupportedError(f"cuDNN's attention needs GPUs of compute capability {_LEAST} or more, not {least}.")
    name, devices = "torch.cuda.cudnn_frontend", frozenset({"cuda"})
    return CudnnFrontend(TorchArrays(), name, "torch", devices, 256 if least[0] == _WIDE else 128)
