"""CUDA's runtime: its memory lies in files that other processes can open, as they open each other's on one machine."""

from __future__ import annotations

import atexit
import ctypes
import mmap
import os
import tempfile
from itertools import count
from pathlib import Path

import numpy as np

_HANDLE = 64  # bytes
_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
_maps = {}

memcpyDeviceToDevice, memcpyDefault = 3, 4  # noqa: N816
streamNonBlocking = 1  # noqa: N816
CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF = 0, 1, 2, 14
eventBlockingSync, eventDisableTiming, eventInterprocess = 1, 2, 4  # noqa: N816


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, words="unknown error"):
        self.status = status
        super().__init__(f"cudaError {status}: {words}")


def getDeviceCount():  # noqa: N802
    count = int(os.environ.get("CUPY_STAND_IN_DEVICES", "2"))
    if count == 0:
        raise CUDARuntimeError(100, "no CUDA-capable device is detected")
    return count


def getDeviceProperties(number):  # noqa: N802
    return {"name": b"stand-in", "uuid": f"stand-in {number:07}".encode(), "multiProcessorCount": 4}


def deviceGetPCIBusId(number):  # noqa: N802
    return f"0000:{number:02x}:00.0"


def deviceCanAccessPeer(here, there):  # noqa: N802
    return here != there and not os.environ.get("CUPY_STAND_IN_APART")


def getDevice():  # noqa: N802
    from cupy import cuda

    return cuda.Device().id


def malloc(size):
    if size > int(os.environ.get("CUPY_STAND_IN_MEMORY", 1 << 40)):
        raise CUDARuntimeError(2, "out of memory")
    file, path = tempfile.mkstemp(prefix=f"cupy-stand-in-{os.getpid()}-", dir=_FOLDER)
    os.truncate(file, max(1, size))
    memory = mmap.mmap(file, max(1, size))
    os.close(file)
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(memory))
    _maps[address] = memory, path, max(1, size)
    return address


def free(address):
    if not address:
        return
    _, path, _ = _maps.pop(address)
    Path(path).unlink(missing_ok=True)


def bytes_at(address, size):
    return np.frombuffer(_maps[address][0], np.uint8)[: max(1, size)]


def memcpy(target, source, size, kind):
    ctypes.memmove(target, source, size)


def memcpyAsync(target, source, size, kind, stream):  # noqa: N802
    _finish(stream)
    ctypes.memmove(target, source, size)


def memcpy2DAsync(target, target_pitch, source, source_pitch, width, height, kind, stream):  # noqa: N802
    if not width <= min(target_pitch, source_pitch) <= max(target_pitch, source_pitch) < 1 << 31:
        raise CUDARuntimeError(12, "invalid pitch argument")
    _finish(stream)
    for row in range(height):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)


def ipcGetMemHandle(address):  # noqa: N802
    if address not in _maps:
        raise CUDARuntimeError(1, "invalid argument")
    name = Path(_maps[address][1]).name.encode()
    return name.ljust(_HANDLE, b"\0")


def ipcOpenMemHandle(handle, flags=1):  # noqa: N802
    if os.environ.get("CUPY_STAND_IN_CLOSED"):
        raise CUDARuntimeError(801, "operation not supported")
    path = Path(_FOLDER) / handle.rstrip(b"\0").decode()
    if any(str(path) == mine and address in _maps for address, (_, mine, _) in _maps.items()):
        raise CUDARuntimeError(201, "invalid device context")  # a process cannot open its own
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(memory))
    opened[address] = memory
    return address


def ipcCloseMemHandle(address):  # noqa: N802
    del opened[address]


@atexit.register
def _taken_back():
    """What a process had is the system's again when it ends."""
    for path in (*_shared_events.values(), *(Path(path) for _, path, _ in _maps.values())):
        path.unlink(missing_ok=True)


opened = {}
"""What this process opened and did not close."""


def ipcGetEventHandle(event):  # noqa: N802
    if event not in _shared_events:
        raise CUDARuntimeError(400, "invalid resource handle")  # made without the flag
    return f"{_shared_events[event].name}".encode().ljust(_HANDLE, b"\0")


def ipcOpenEventHandle(handle):  # noqa: N802
    path = Path(_FOLDER) / handle.rstrip(b"\0").decode()
    if path in _shared_events.values():
        raise CUDARuntimeError(201, "invalid device context")
    event = next(_numbers)
    opened_events[event] = path
    return event


opened_events = {}
"""Events of other processes that this one opened and did not destroy."""
_shared_events = {}  # of this process: a file each, which is not empty once the event was recorded
_numbers = count(1 << 32)


def eventCreateWithFlags(flags):  # noqa: N802
    event = next(_numbers)
    if flags & eventInterprocess:
        file, path = tempfile.mkstemp(prefix=f"cupy-stand-in-event-{os.getpid()}-", dir=_FOLDER)
        os.close(file)
        _shared_events[event] = Path(path)
    return event


def eventQuery(event):  # noqa: N802
    if event in opened_events and not opened_events[event].exists():
        raise AssertionError("CUDA does not say what comes of an event that its own process destroyed")
    return 0 if all(work.done() for work in events_work.get(event, ())) else 600


def deviceSynchronize():  # noqa: N802
    pass


def _finish(stream):
    for work in streams_work.pop(stream, ()):
        work.result()


def streamQuery(stream):  # noqa: N802
    return 0 if all(work.done() for work in streams_work.get(stream, ())) else 600


def streamSynchronize(stream):  # noqa: N802
    _finish(stream)


def streamWaitEvent(stream, event, flags=0):  # noqa: N802
    if event in opened_events and not opened_events[event].stat().st_size:
        raise AssertionError("CUDA would not wait for an event of another process that was never recorded")
    for work in events_work.get(event, ()):
        work.result()


def eventRecord(event, stream):  # noqa: N802
    if event in _shared_events:
        os.truncate(_shared_events[event], 1)  # never empty again, as it would be for a moment if it were written anew
    events_work[event] = [work for work in streams_work.get(stream, ()) if not work.done()]


def eventDestroy(event):  # noqa: N802
    events_work.pop(event, None)
    if event in _shared_events:
        _shared_events.pop(event).unlink(missing_ok=True)
    opened_events.pop(event, None)


streams_work = {}
"""What NCCL was given to do on each stream, as futures: all else is done at once."""
events_work = {}
"""What each event stands behind."""


def setDevice(number):  # noqa: N802
    from cupy import cuda

    cuda.Device(number).use()


def memGetInfo():  # noqa: N802
    return 1 << 33, 1 << 34
