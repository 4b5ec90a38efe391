"""What is flash_attn 2 for packages that are imported after `install`, where that cannot be installed itself.

FLASH_ATTN in the environment says which: "cpu", dense attention written for audits (flash_attn_on_cpu.py), or "gpu",
the same kernels as Torch has them (tests/benchmarks/flash_attn_stand_in.py), which has no softcap.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

STAND_INS = {"cpu": "flash_attn_on_cpu", "gpu": "flash_attn_stand_in"}


def install():
    """Be flash_attn for what is imported from now on."""
    sys.path.append(str(Path(__file__).parents[3] / "tests" / "benchmarks"))
    importlib.import_module(STAND_INS[os.environ.get("FLASH_ATTN", "cpu")]).install()
    # ring-flash-attn patches transformers as it is imported; no attention is in that part.
    adapters = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules.setdefault("ring_flash_attn.adapters", adapters)
