"""CuPy: partials merged in one pass, and kernels in tiles over cuBLAS for what no fused kernel takes."""

from ringcore_cupy.memory import TileMemoryError
from ringcore_cupy.tiled import Tiled

__all__ = ["TileMemoryError", "Tiled"]
