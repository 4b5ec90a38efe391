"""Devices, of which every thread has a current one."""

from __future__ import annotations

import threading

from cupy.cuda import runtime

_here = threading.local()


class Device:
    """One of as many devices as CUPY_STAND_IN_DEVICES says, 2 by default."""

    def __init__(self, device=None):
        self.id = getattr(_here, "device", 0) if device is None else int(device)
        if device is not None and not 0 <= self.id < runtime.getDeviceCount():
            raise runtime.CUDARuntimeError(101, "invalid device ordinal")

    def use(self):
        _here.device = self.id

    def synchronize(self):
        pass

    compute_capability = "90"

    def __enter__(self):
        _here.before = [*getattr(_here, "before", []), getattr(_here, "device", 0)]
        self.use()
        return self

    def __exit__(self, *_):
        _here.device = _here.before.pop()

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None

    def __int__(self):
        return self.id

    def __repr__(self):
        return f"<CUDA Device {self.id}>"


def get_cublas_handle():
    return 1
