"""Devices, streams and memory, all of them the host's."""

from __future__ import annotations

import ctypes
import threading
import weakref
from itertools import count

import numpy as np

from cupy.cuda import cublas, device, memory, nccl, runtime
from cupy.cuda.device import Device

_ALIGNED = 512
_POISON = 0xFF  # NaN in every floating dtype
_here = threading.local()
_numbers = count(1)


class MemoryPointer:
    """A place in memory, which it keeps alive."""

    def __init__(self, mem, offset):
        self.mem, self.ptr, self.device = mem, mem.ptr + offset, mem.device
        self.device_id = mem.device.id
        self._offset = offset

    @classmethod
    def at(cls, numbers, device):
        found = cls.__new__(cls)
        found.mem, found.ptr, found.device, found.device_id = numbers, numbers.ctypes.data, device, device.id
        return found

    def bytes(self):
        return self.mem.bytes()[self._offset :]

    def __add__(self, offset):
        return MemoryPointer(self.mem, self._offset + offset)

    def copy_from_device_async(self, src, size, stream=None):
        ctypes.memmove(self.ptr, src.ptr, size)

    copy_from_device = copy_from_device_async

    def memset_async(self, value, size, stream=None):
        ctypes.memset(self.ptr, value, size)

    memset = memset_async


class _Room:
    """Memory of the pool: poisoned, and counted as long as it lives."""

    def __init__(self, size):
        self.size, self.device = size, Device()
        whole = np.full(max(1, size) + _ALIGNED, _POISON, np.uint8)
        start = -whole.ctypes.data % _ALIGNED
        self._bytes = whole[start : start + max(1, size)]
        self.ptr = self._bytes.ctypes.data

    def bytes(self):
        return self._bytes


class Memory(_Room):
    """As cudaMalloc gives it: memory of its own, which other processes can open."""

    def __init__(self, size):
        self.size, self.device = size, Device()
        self.ptr = runtime.malloc(size)
        self._bytes = runtime.bytes_at(self.ptr, size)
        self._bytes[...] = _POISON

    def __del__(self):
        if getattr(self, "ptr", 0):
            self._bytes = None
            runtime.free(self.ptr)
            self.ptr = 0


class UnownedMemory(_Room):
    """Memory that somebody else keeps."""

    def __init__(self, ptr, size, owner, device_id=-1):
        self.ptr, self.size, self.owner = ptr, size, owner
        self.device = Device(None if device_id < 0 else device_id)
        self._bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(ptr), np.uint8)


class MemoryPool:
    """What counts the bytes of arrays that live."""

    def __init__(self):
        self._rooms = {}
        self._limit = 0

    def set_limit(self, size=None):
        """The most bytes that may live; 0 is any number."""
        self._limit = size or 0

    def malloc(self, size):
        if self._limit and self.used_bytes() + size > self._limit:
            raise memory.OutOfMemoryError(size, self.used_bytes(), self._limit)
        room = _Room(size)
        key = next(_numbers)
        self._rooms[key] = size
        weakref.finalize(room._bytes.base, self._rooms.pop, key, None)
        return MemoryPointer(room, 0)

    def used_bytes(self):
        return sum(self._rooms.values())

    total_bytes = used_bytes

    def free_all_blocks(self):
        pass


class PinnedMemoryPool:
    """What keeps pinned memory that nobody uses any more; here it counts such blocks alone."""

    def __init__(self):
        self._unused = []

    def watch(self, memory):
        weakref.finalize(memory, self._unused.append, None)

    def n_free_blocks(self):
        return len(self._unused)

    def free_all_blocks(self):
        self._unused.clear()


pool, pinned_pool = MemoryPool(), PinnedMemoryPool()


def alloc(size):
    return pool.malloc(size)


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self.ptr = runtime.eventCreateWithFlags(interprocess and runtime.eventInterprocess)

    def __del__(self):
        if getattr(self, "ptr", 0):
            runtime.eventDestroy(self.ptr)

    def record(self, stream=None):
        runtime.eventRecord(self.ptr, (get_current_stream() if stream is None else stream).ptr)

    def synchronize(self):
        for work in runtime.events_work.get(self.ptr, ()):
            work.result()

    @property
    def done(self):
        return runtime.eventQuery(self.ptr) == 0


class Stream:
    """A stream whose work is done as soon as it is given."""

    null: Stream

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = 0 if null else next(_numbers)
        self.device_id = Device().id

    def use(self):
        _here.stream = self
        return self

    def __enter__(self):
        if self.device_id != Device().id:
            raise RuntimeError("The device that the stream is created on does not match with the current device")
        _here.streams = [*getattr(_here, "streams", []), get_current_stream()]
        return self.use()

    def __exit__(self, *_):
        _here.stream = _here.streams.pop()

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        runtime.streamWaitEvent(self.ptr, event.ptr)

    def synchronize(self):
        runtime.streamSynchronize(self.ptr)

    def is_capturing(self):
        return False

    @property
    def done(self):
        return runtime.streamQuery(self.ptr) == 0


class ExternalStream(Stream):
    def __init__(self, ptr, device_id=-1):
        self.ptr, self.device_id = ptr, Device().id if device_id < 0 else device_id


Stream.null = Stream(null=True)


def get_current_stream(device_id=-1):
    return getattr(_here, "stream", Stream.null)


def get_device_id():
    return Device().id


def is_available():
    return True


def alloc_pinned_memory(size):
    return (ctypes.c_uint8 * max(1, size))()


get_cublas_handle = device.get_cublas_handle

__all__ = [
    "Device", "Event", "ExternalStream", "Memory", "MemoryPointer", "MemoryPool", "PinnedMemoryPool", "Stream", "UnownedMemory", "alloc",
    "alloc_pinned_memory", "cublas", "device", "get_current_stream", "get_device_id", "is_available", "memory",
    "nccl", "runtime",
]  # fmt: skip
