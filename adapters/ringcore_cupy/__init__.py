"""CuPy: partials in one pass, kernels over cuBLAS for what no fused kernel takes, and rings of GPUs over any ring."""

from ringcore_cupy.memory import TileMemoryError
from ringcore_cupy.tiled import Tiled
from ringcore_cupy.transport import CupyTransport

__all__ = ["CupyTransport", "TileMemoryError", "Tiled"]
