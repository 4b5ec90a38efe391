"""NCCL between processes of one machine: bytes go through files, on a thread of each communicator.

As with NCCL, what is posted runs in its order and beside the host; a send ends when it was received; two ranks on one
GPU are refused; and groups that do not fit together stand still, here until a deadline.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

available = True
NCCL_INT8, NCCL_UINT8, NCCL_CHAR = 0, 1, 0

_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
_ID = 128  # bytes
_DEADLINE = float(os.environ.get("CUPY_STAND_IN_NCCL_DEADLINE", "40"))
_here = threading.local()


class NcclError(RuntimeError):
    def __init__(self, status, words="internal error"):
        self.status = status
        super().__init__(f"NCCL_ERROR_{status}: {words}")


def get_version():
    return 22800


def get_unique_id():
    return tempfile.mkdtemp(prefix="cupy-stand-in-nccl-", dir=_FOLDER).encode().ljust(_ID, b"\0")


def groupStart():  # noqa: N802
    _here.group = []


def groupEnd():  # noqa: N802
    group, _here.group = _here.group, None
    for communicator in {item[0] for item in group}:
        communicator._given([item[1:] for item in group if item[0] is communicator])


class NcclCommunicator:
    def __init__(self, ndev, commId, rank, config=None):  # noqa: N803
        from cupy.cuda import runtime

        if len(commId) != _ID:
            raise ValueError(f"commId length {len(commId)} != {_ID}.")
        self._folder, self._rank, self._size = Path(commId.rstrip(b"\0").decode()), rank, ndev
        self._stopped = False
        self._sent, self._received = [0] * ndev, [0] * ndev
        self._threads = ThreadPoolExecutor(1)
        gpu = runtime.deviceGetPCIBusId(runtime.getDevice())
        _written(self._folder / f"rank-{rank}", gpu.encode())
        paths = [self._folder / f"rank-{peer}" for peer in range(ndev)]
        self._until(lambda: all(path.exists() for path in paths))
        gpus = [path.read_text() for path in paths]
        _written(self._folder / f"seen-{rank}", b"")
        self._until(lambda: all((self._folder / f"seen-{peer}").exists() for peer in range(ndev)))
        if len(set(gpus)) < ndev:
            raise NcclError(5, "Duplicate GPU detected")

    def send(self, sendbuf, count, datatype, peer, stream):
        self._add("send", sendbuf, count, peer, stream)

    def recv(self, recvbuf, count, datatype, peer, stream):
        self._add("recv", recvbuf, count, peer, stream)

    def check_async_error(self):
        if self._stopped:
            raise NcclError(4, "the communicator is gone")

    def abort(self):
        self._stopped = True
        self._threads.shutdown(wait=True)
        self._folder_done()

    def destroy(self):
        if not self._stopped:
            self._threads.shutdown(wait=True)
            self._stopped = True
            self._folder_done()

    def _folder_done(self):
        (self._folder / f"rank-{self._rank}").unlink(missing_ok=True)
        if not any(path.exists() for path in (self._folder / f"rank-{peer}" for peer in range(self._size))):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, way, address, count, peer, stream):
        self.check_async_error()
        if not 0 <= peer < self._size:
            raise NcclError(4, "invalid argument")
        alone = getattr(_here, "group", None) is None
        if alone:
            groupStart()
        _here.group.append((self, way, address, count, peer, stream))
        if alone:
            groupEnd()

    def _given(self, letters):
        from cupy.cuda import runtime

        (stream,) = {letter[-1] for letter in letters}
        runtime.streams_work.setdefault(stream, []).append(self._threads.submit(self._run, letters))

    def _run(self, letters):
        leaving = []
        for way, address, count, peer, _ in letters:
            if way == "send":
                path = self._folder / f"{self._rank}-{peer}-{self._sent[peer]}"
                self._sent[peer] += 1
                _written(path, ctypes.string_at(address, count))
                leaving.append(path)
        for way, address, count, peer, _ in letters:
            if way == "recv":
                path = self._folder / f"{peer}-{self._rank}-{self._received[peer]}"
                self._received[peer] += 1
                self._until(path.exists)
                data = path.read_bytes()
                if len(data) != count:
                    raise AssertionError(f"{len(data)} bytes came from rank {peer}, not {count}")
                ctypes.memmove(address, data, count)
                path.unlink()
        self._until(lambda: not any(path.exists() for path in leaving))

    def _until(self, condition):
        end = time.monotonic() + _DEADLINE
        while not condition():
            if self._stopped:
                return
            if time.monotonic() > end:
                raise TimeoutError("NCCL would stand still for ever: a rank did not post what this one waits for")
            time.sleep(0.0002)


def _written(path, data):
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)
