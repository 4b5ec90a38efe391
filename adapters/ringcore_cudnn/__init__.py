"""cuDNN's attention through its frontend, on raw pointers: for Torch and CuPy, with masks in the kernel."""

from ringcore_cudnn.arrays import Arrays
from ringcore_cudnn.engine import Engine
from ringcore_cudnn.graphs import Problem
from ringcore_cudnn.kernels import CudnnFrontend

__all__ = ["Arrays", "CudnnFrontend", "Engine", "Problem"]
