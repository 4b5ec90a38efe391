"""A ring of threads: a transport of the host's memory for rings in one process, as small as the protocol allows."""

import queue
import threading
from collections import defaultdict

import cupy
import numpy as np
from happens_before import TRACE

from ringcore import PeerError

DEADLINE = 20


class World:
    """What the threads of a ring share."""

    def __init__(self, size):
        self.size = size
        self.failed = threading.Event()
        self._mail = defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def box(self, *name):
        with self._lock:
            return self._mail[name]


class ThreadHost:
    """One thread's end; implements `ringcore.Transport`. ``nodes`` are those of all ranks."""

    sharers = 1
    timeout = DEADLINE

    def __init__(self, world, rank, nodes=None, device_buffers=False):
        self.world, self.rank, self.size = world, rank, world.size
        self.node = 0 if nodes is None else nodes[rank]
        self.device_buffers = device_buffers
        self.count = 0

    def check(self, *arrays):
        pass

    def gather(self, note):
        self.count += 1
        for peer in range(self.size):
            self._put("note", self.rank, peer, self.count, note)
        return tuple(self._get("note", peer, self.rank, self.count) for peer in range(self.size))

    def exchange(self, kind, sends, receives):
        for move, blocks in sends:
            for x in blocks:
                TRACE.host(x, "read", "a message")
            copies = [np.array(x.numbers if isinstance(x, cupy.ndarray) else x) for x in blocks]
            self._put(kind, self.rank, move.peer, move.block, copies)
        arriving = [(move, tuple(spec.empty() for spec in specs)) for move, specs in receives]
        for _, blocks in arriving:
            for x in blocks:
                TRACE.host(x, "write", "a message")
        return Mail(self, kind, arriving)

    def abort(self, error):
        self.world.failed.set()

    def _put(self, kind, source, target, block, what):
        self.world.box(kind, source, target, block).put((TRACE.told(), what))

    def _get(self, kind, source, target, block):
        box = self.world.box(kind, source, target, block)
        for _ in range(DEADLINE * 50):
            try:
                clock, what = box.get(timeout=0.02)
            except queue.Empty:
                if self.world.failed.is_set():
                    raise PeerError("a peer failed") from None
                continue
            TRACE.heard(clock)
            return what
        raise TimeoutError(f"rank {target} waited for {kind} {block} of rank {source}")


class Mail:
    def __init__(self, host, kind, arriving):
        self.host, self.kind, self.arriving = host, kind, arriving

    def wait(self):
        for move, blocks in self.arriving:
            came = self.host._get(self.kind, move.peer, self.host.rank, move.block)
            for x, y in zip(blocks, came, strict=True):
                (x.numbers if isinstance(x, cupy.ndarray) else x)[...] = y
        return dict(self.arriving)


def in_threads(size, rank_of, *arguments):
    """Run ``rank_of(world, rank, *arguments)`` in a thread for each rank; what they return, or the first error."""
    world, found, errors = World(size), [None] * size, []

    def run(rank):
        try:
            cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
            with cupy.cuda.Stream(non_blocking=True):
                found[rank] = rank_of(world, rank, *arguments)
        except BaseException as error:
            errors.append(error)
            world.failed.set()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * DEADLINE)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise next((error for error in errors if not isinstance(error, PeerError)), errors[0])
    return found
