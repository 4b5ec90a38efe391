"""Torch: fused kernels, autograd, and rings over torch.distributed."""

from ringcore_torch.flash_cpu import FlashCpu
from ringcore_torch.operator import attend
from ringcore_torch.transport import TorchTransport, adapt

__all__ = ["FlashCpu", "TorchTransport", "adapt", "attend", "load_cpu"]


def load_cpu(sharers: int = 1) -> FlashCpu:
    """The kernels for tensors in host memory; their threads are Torch's own (torch.set_num_threads)."""
    return FlashCpu()
