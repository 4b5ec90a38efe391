"""What streams do, and in which order that is certain to happen: a detector of races by vector clocks.

The stand-in runs everything at once, so that it never shows a missing wait. Here every access to memory is noted with
what is certain to have happened before it: earlier work of its stream, what stood before the events that this stream
waited for, and what the host had waited for when it gave the work. Two accesses to the same bytes, one of which
writes, are a race unless one is certain to come before the other. Memory of CuPy's pool inherits the accesses of what
was freed to the same stream: it may be the same memory.
"""

import threading
import weakref
from contextlib import contextmanager

import cupy
import cupyx
import numpy as np
from cupy import arrays, cuda
from cupy.cuda import nccl, runtime


class Trace:
    """The accesses of all threads while it is on, and the races among them."""

    def __init__(self):
        self.on = False
        self.lock = threading.RLock()
        self.here = threading.local()

    def begin(self):
        self.on, self.races = True, []
        self.clocks, self.events, self.rooms, self.freed = {}, {}, {}, {}

    # Clocks: {stream: how many of its accesses are certain to have happened}.

    def host_clock(self):
        if not hasattr(self.here, "clock") or getattr(self.here, "of", None) is not self.clocks:
            self.here.clock, self.here.of = {}, self.clocks
        return self.here.clock

    def told(self):
        return dict(self.host_clock()) if self.on else {}

    def heard(self, clock):
        if self.on:
            _merge(self.host_clock(), clock)

    def record(self, event, stream):
        with self.lock:
            self.events[event] = dict(self.clocks.get(stream, {}))

    def wait(self, stream, event):
        with self.lock:
            _merge(self.clocks.setdefault(stream, {}), self.events.get(event, {}))

    def done(self, clocks, x, asked):
        is_done = asked(x)
        if self.on and is_done:
            self.synchronized(getattr(self, clocks).get(x.ptr))
        return is_done

    def synchronized(self, clock):
        _merge(self.host_clock(), clock or {})

    # Memory.

    def room(self, owner, address, size, arena):
        """New memory, of which ``owner`` lives as long; what freed memory of the arena still sees, it may see."""
        with self.lock:
            past = [(0, size, *rest) for _, _, *rest in self.freed.get(arena, [])]
            self.rooms[address] = size, past
            weakref.finalize(owner, self.left, self.rooms, address, arena)

    def left(self, rooms, address, arena):
        with self.lock:
            if self.on and rooms is self.rooms and address in rooms:
                _, past = rooms.pop(address)
                latest = {(stream, way): (0, 0, stream, tick, way, what) for _, _, stream, tick, way, what in past}
                kept = self.freed.setdefault(arena, [])
                kept[:] = list({**{(item[2], item[4]): item for item in kept}, **latest}.values())

    def access(self, address, size, way, what, stream=None):
        """One access of a stream, the current one by default."""
        if not self.on or not size:
            return
        with self.lock:
            stream = cuda.get_current_stream().ptr if stream is None else stream
            clock = self.clocks.setdefault(stream, {})
            _merge(clock, self.host_clock())
            clock[stream] = clock.get(stream, 0) + 1
            for base, (length, past) in self.rooms.items():
                if base <= address < base + length:
                    place = address - base, address - base + size
                    for start, end, other, tick, before, label in past:
                        conflict = "write" in (way, before) and start < place[1] and place[0] < end
                        if conflict and clock.get(other, 0) < tick:
                            self.races.append(f"{what} ({way}) against {label} ({before})")
                    past.append((*place, stream, clock[stream], way, what))
                    return

    def array(self, x, way, what, stream=None):
        numbers = x.numbers if isinstance(x, cupy.ndarray) else x
        low, high = np.lib.array_utils.byte_bounds(numbers)
        self.access(low, high - low if numbers.size else 0, way, what, stream)

    def host(self, x, way, what):
        """One access of the host itself, behind all that it waited for."""
        if self.on:
            with self.lock:
                name = f"host {threading.get_ident()}"
                self.clocks[name] = {**self.host_clock(), name: self.clocks.get(name, {}).get(name, 0)}
                self.array(x, way, what, name)
                self.host_clock()[name] = self.clocks[name][name]


TRACE = Trace()


def _merge(clock, other):
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


@contextmanager
def traced(monkeypatch):
    """While it lasts the stand-in tells the trace what it does, and a process may open its own memory."""
    handles = {}

    def around(owner, name, before=None, after=None):
        original = getattr(owner, name)

        def ours(*args, **kwargs):
            if before:
                before(*args, **kwargs)
            found = original(*args, **kwargs)
            if after:
                after(found, *args, **kwargs)
            return found

        monkeypatch.setattr(owner, name, ours)

    def copied(target, source, size, kind, stream):
        TRACE.access(source, size, "read", "a copy", stream)
        TRACE.access(target, size, "write", "a copy", stream)

    def copied_pieces(target, target_pitch, source, source_pitch, width, height, kind, stream):
        for n in range(height):
            copied(target + n * target_pitch, source + n * source_pitch, width, kind, stream)

    def set_item(x, index, value):
        TRACE.array(x, "write", "an assignment")
        if isinstance(value, cupy.ndarray):
            TRACE.array(value, "read", "an assignment")

    def added(x, y):
        TRACE.array(x, "write", "a sum")
        TRACE.array(y, "read", "a sum")

    around(runtime, "memcpyAsync", copied)
    around(runtime, "memcpy2DAsync", copied_pieces)
    around(runtime, "eventRecord", TRACE.record)
    around(runtime, "streamWaitEvent", lambda stream, event, flags=0: TRACE.wait(stream, event))
    around(runtime, "streamSynchronize", after=lambda _, stream: TRACE.synchronized(TRACE.clocks.get(stream)))
    around(cuda.Event, "synchronize", after=lambda _, event: TRACE.synchronized(TRACE.events.get(event.ptr)))
    for kind, clocks in ((cuda.Event, "events"), (cuda.Stream, "clocks")):
        asked = kind.done.fget
        monkeypatch.setattr(kind, "done", property(lambda x, asked=asked, clocks=clocks: TRACE.done(clocks, x, asked)))
    around(arrays.ndarray, "__setitem__", set_item)
    around(arrays.ndarray, "__iadd__", added)
    around(cupy, "ascontiguousarray", after=lambda found, x: TRACE.array(x, "read", "a copy in order"))
    around(cuda.Memory, "__init__", after=lambda _, memory, size: TRACE.room(memory, memory.ptr, size, memory.ptr))
    pool = lambda _, room, size: TRACE.room(room._bytes.base, room.ptr, size, cuda.get_current_stream().ptr)  # noqa: E731
    around(cuda._Room, "__init__", after=pool)

    def pinned(found, *_):
        TRACE.room(
            found.base if found.base is not None else found, found.ctypes.data, found.nbytes, threading.get_ident()
        )

    around(cupyx, "empty_pinned", after=pinned)

    def letter(way):
        return lambda self, address, size, kind, peer, stream: TRACE.access(address, size, way, "NCCL", stream)

    around(nccl.NcclCommunicator, "send", letter("read"))
    around(nccl.NcclCommunicator, "recv", letter("write"))
    handle = lambda x: f"{x:064x}".encode()  # noqa: E731
    monkeypatch.setattr(runtime, "ipcGetMemHandle", handle)
    monkeypatch.setattr(runtime, "ipcOpenMemHandle", lambda text, flags=1: int(text, 16))
    monkeypatch.setattr(runtime, "ipcCloseMemHandle", lambda address: handles.pop(address, None))
    monkeypatch.setattr(runtime, "ipcGetEventHandle", handle)
    monkeypatch.setattr(runtime, "ipcOpenEventHandle", lambda text: int(text, 16))
    monkeypatch.setattr(runtime, "eventDestroy", lambda event: None)
    TRACE.begin()
    try:
        yield TRACE
    finally:
        TRACE.on = False
