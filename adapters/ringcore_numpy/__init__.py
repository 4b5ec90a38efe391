"""Tuned NumPy kernels for ringcore: tiled, in place, on every allowed core."""

from ringcore_numpy.kernels import NumpyKernels, load

__all__ = ["NumpyKernels", "load"]
