"""The kernels in CUDA C compiled by NVRTC for GPUs that need not be there: none spills registers into memory.

Needs nvidia-cuda-nvrtc and nvidia-cuda-runtime, whose headers CuPy gives NVRTC too.
"""

from __future__ import annotations

import ctypes
import re
from importlib.metadata import files
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ringcore_cupy.blocks import MOST_KEYS
from ringcore_cupy.compiling import BLOCK, options, source

pytestmark = pytest.mark.timeout(120)
ARCHITECTURES = ("sm_80", "sm_90")
REGISTERS = 65536 // BLOCK // 2  # of a thread, so that at least two blocks fit into a multiprocessor
WIDE = {"float64": np.dtype(np.float64)}
KINDS = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
KINDS["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


def located(package, name):
    (found,) = (file for file in files(package) if re.fullmatch(name, file.name))
    return Path(found.locate())


@pytest.fixture(scope="module")
def nvrtc():
    return ctypes.CDLL(located("nvidia-cuda-nvrtc", r"libnvrtc\.so\.\d+"))


def compiled(nvrtc, file, architecture, **kinds):
    """What the compiler says; raises AssertionError with its errors."""
    headers = located("nvidia-cuda-runtime", "cuda_fp16.h").parent
    asked = (
        f"--gpu-architecture={architecture}", "--std=c++17", f"-I{headers}", "--ptxas-options=-v", *options(**kinds)
    )  # fmt: skip
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source(file).encode(), file.encode(), 0, None, None) == 0
    texts = (ctypes.c_char_p * len(asked))(*(text.encode() for text in asked))
    status = nvrtc.nvrtcCompileProgram(program, len(asked), texts)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    said = log.value.decode()
    assert status == 0, said
    return said


def check(said, names):
    assert set(re.findall(r"entry function '(\w+)'", said)) == names
    assert set(re.findall(r"(\d+) bytes stack frame", said)) == {"0"}
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) <= REGISTERS
    assert "warning" not in said


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("soft", "drops"), [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize(
    ("kind", "bias"), [("float64", "float16"), ("float32", "float32"), ("float16", "bfloat16"), ("bfloat16", "float64")]
)
def test_tiles(nvrtc, kind, bias, soft, drops, architecture):
    kinds = {"WIDE": WIDE.get(kind, KINDS["float32"]), "NUMBER": KINDS[kind], "BIAS": KINDS[bias]}
    said = compiled(nvrtc, "tiled.cu", architecture, SOFT=soft, DROPS=drops, MOST_KEYS=MOST_KEYS, **kinds)
    check(said, {"clean", "weigh", "pull_back", "pull_back_bias"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("state", KINDS)
@pytest.mark.parametrize("part", KINDS)
def test_partials(nvrtc, part, state, architecture):
    wide = WIDE.get("float64" if "float64" in (part, state) else "float32", KINDS["float32"])
    said = compiled(nvrtc, "partials.cu", architecture, WIDE=wide, STATE=KINDS[state], PART=KINDS[part])
    check(said, {"merge", "divide", "lse"})


def test_mistakes_are_seen(nvrtc):
    with pytest.raises(AssertionError, match="WIDE"):
        compiled(nvrtc, "partials.cu", "sm_90", STATE=KINDS["float32"], PART=KINDS["float32"])
