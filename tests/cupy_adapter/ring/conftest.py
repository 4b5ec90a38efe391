"""Tests of rings over CuPy's stand-in: ``PYTHONPATH=tests/cupy_stand_in python -m pytest tests/cupy_adapter/ring``."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("CUPY_STAND_IN_DEVICES", "4")

if find_spec("cupy.arrays") is None:  # CuPy itself, on a GPU, which shows nobody what its streams do
    collect_ignore = [
        "test_blocks_between.py", "test_captured.py", "test_connecting.py", "test_order.py", "test_unfinished.py", "world",
    ]  # fmt: skip
