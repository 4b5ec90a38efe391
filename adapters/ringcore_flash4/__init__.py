"""flash-attn-4: fused kernels for Hopper and Blackwell GPUs."""

from ringcore_flash4.kernels import Flash4, load

__all__ = ["Flash4", "load"]
