"""NumPy's, of arrays of ours."""

from __future__ import annotations

import numpy as _np

from cupy.arrays import wrapped

for _name in _np.fft.__all__:
    if not isinstance(getattr(_np.fft, _name), type):
        globals()[_name] = wrapped(getattr(_np.fft, _name))
__all__ = [_name for _name in _np.fft.__all__ if _name in globals()]
