"""Tests of rings over CuPy's stand-in: ``PYTHONPATH=tests/cupy_stand_in python -m pytest tests/cupy_adapter/ring``."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("CUPY_STAND_IN_DEVICES", "4")
