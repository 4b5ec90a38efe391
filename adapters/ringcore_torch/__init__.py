"""Torch: fused kernels, autograd, and rings over torch.distributed."""

from ringcore_torch.aten_cuda import Cudnn, Flash2
from ringcore_torch.efficient_cuda import Efficient
from ringcore_torch.flash_cpu import FlashCpu
from ringcore_torch.modules import DilatedAttention, MultiheadDilatedAttention
from ringcore_torch.operator import attend
from ringcore_torch.transport import TorchTransport, adapt

__all__ = [
    "Cudnn",
    "DilatedAttention",
    "Efficient",
    "Flash2",
    "FlashCpu",
    "MultiheadDilatedAttention",
    "TorchTransport",
    "adapt",
    "attend",
    "load_cpu",
    "load_cudnn",
    "load_efficient",
    "load_flash2",
]


def load_cpu(sharers: int = 1) -> FlashCpu:
    """The kernels for tensors in host memory; their threads are Torch's own (torch.set_num_threads)."""
    return FlashCpu()


def load_cudnn(sharers: int = 1) -> Cudnn:
    """cuDNN's kernels for tensors on a GPU."""
    return Cudnn()


def load_efficient(sharers: int = 1) -> Efficient:
    """The memory-efficient kernels for float32 tensors on a GPU."""
    return Efficient()


def load_flash2(sharers: int = 1) -> Flash2:
    """FlashAttention-2 for tensors on a GPU."""
    return Flash2()
