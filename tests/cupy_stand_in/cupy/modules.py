"""Kernels in CUDA C, compiled for the CPU: one warp after the other, each of CUPY_STAND_IN_LANES lanes (1 by default).

A kernel says how many lanes share a row by the macro LANES, and reduces among them by functions of its own that do
nothing if it is 1. Lanes take turns at barriers and shuffles of a warp; with a block's barriers in it, a kernel runs
with one thread in a block alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from cupy import cuda
from cupy.arrays import ndarray

_HEADER = Path(__file__).with_name("cuda_on_cpu.h")
LANES = int(os.environ.get("CUPY_STAND_IN_LANES", "1"))
_LAUNCH = """
extern "C" int launch_{}(void **given, const int *sizes, int count, const unsigned *grid, const unsigned *block) {{
    return launched({}, given, sizes, count, grid, block);
}}"""
_one_launch = threading.Lock()
_KINDS = {np.dtype(np.float32): ctypes.c_float, np.dtype(np.float64): ctypes.c_double, np.dtype(np.int32): ctypes.c_int}


class RawModule:
    def __init__(self, *, code, options=(), backend="nvrtc", name_expressions=None):
        self._library = ctypes.CDLL(_built(code, tuple(options), tuple(name_expressions or ())))
        self._names = {name: f"expression_{n}" for n, name in enumerate(name_expressions or ())}

    def get_function(self, name):
        return _Function(self._library, self._names.get(name, name))


class RawKernel:
    def __init__(self, code, name, options=(), **_):
        self._function = RawModule(code=code, options=options).get_function(name)

    def __call__(self, grid, block, args, shared_mem=0):
        self._function(grid, block, args, shared_mem=shared_mem)


class _Function:
    def __init__(self, library, name):
        self._name, self._function = name, library[f"launch_{name}"]
        self.max_dynamic_shared_size_bytes = 0

    def __call__(self, grid, block, args, *, shared_mem=0):
        grid, block = ((*shape, 1, 1)[:3] for shape in (grid, block))
        if max(grid[1:]) > 65535 or grid[0] > 0x7FFFFFFF or int(np.prod(block)) > 1024 or min(*grid, *block) < 1:
            raise ValueError(f"CUDA_ERROR_INVALID_VALUE: grid {grid}, block {block}")
        if LANES > 1 and block[0] % LANES:
            raise ValueError(f"blocks of {block} are no whole warps of {LANES} lanes")
        if any(isinstance(x, ndarray) and x.device != cuda.Device() for x in args):
            raise ValueError("an array is not on the current device")
        given = [_argument(x) for x in args]
        pointers = (ctypes.c_void_p * len(given))(*map(ctypes.addressof, given))
        sizes = (ctypes.c_int * len(given))(*map(ctypes.sizeof, given))
        with _one_launch:
            wrong = self._function(pointers, sizes, len(given), (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block))
        if wrong == -2:
            raise RuntimeError(f"the lanes of a warp of {self._name} do not meet at the same barriers")
        if wrong:
            which = f"{len(given)} arguments" if wrong < 0 else f"argument {wrong} of {sizes[wrong - 1]} bytes"
            raise TypeError(f"{self._name} does not take {which}")


def _argument(x):
    if isinstance(x, ndarray):
        return ctypes.c_void_p(x.data.ptr)
    if isinstance(x, bool):
        return ctypes.c_bool(x)
    if isinstance(x, int):
        return ctypes.c_longlong(x)
    if isinstance(x, float):
        return ctypes.c_double(x)
    if isinstance(x, np.generic) and x.dtype in _KINDS:
        return _KINDS[x.dtype](x.item())
    if isinstance(x, np.int64):
        return ctypes.c_longlong(int(x))
    if hasattr(x, "ptr"):
        return ctypes.c_void_p(int(x.ptr))
    raise TypeError(f"Unsupported type {type(x)}")


def _compiler():
    return ["c++"] if shutil.which("c++") else [sys.executable, "-m", "ziglang", "c++"]


def _built(code, options, expressions):
    header = _HEADER.read_text()
    kept = [option for option in options if option.startswith(("-D", "--define-macro"))]
    # Without a name expression CuPy finds what is declared extern "C" alone.
    names = {name: name for name in re.findall(r'extern\s+"C"\s+__global__\s+void\s+(\w+)\s*\(', code)}
    names |= {f"expression_{n}": name for n, name in enumerate(expressions)}
    body = "\n".join([f'#include "{_HEADER}"', code, *(_LAUNCH.format(*pair) for pair in names.items())])
    key = hashlib.sha256("\0".join([header, body, str(LANES), *kept]).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"cupy-stand-in-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        source, made = (folder / f"{key}.{os.getpid()}.{threading.get_ident()}.{ending}" for ending in ("cpp", "so"))
        source.write_text(body)
        lanes = f"-DLANES={LANES}"
        command = [*_compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-w", lanes, *kept, "-o", made, source]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if run.returncode:
            raise RuntimeError(f"the kernel does not compile:\n{run.stderr}")
        os.replace(made, library)
        source.unlink()
    return str(library)
