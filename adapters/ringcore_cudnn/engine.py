"""Running cuDNN graphs on raw addresses: built once for each kind of tile, on a handle for each device and thread."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import cudnn

from ringcore import MissingDependency, UnsupportedError
from ringcore_cudnn.graphs import Graph, Problem

_KEPT = 256  # graphs of one thread on one device
_LEAST = 91002  # cuDNN 9.10.2: bounds on both sides beside what is added to the scores


class Engine:
    """Attention on one device's memory, whatever library it belongs to.

    kept: how many graphs a thread keeps for a device; those that ran longest ago go first.
    Raises MissingDependency if the frontend finds no cuDNN, UnsupportedError if it is too old.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        check_library()
        self._kept = kept
        self._here = threading.local()
        self._idle: defaultdict[int, list[Any]] = defaultdict(list)

    def run(
        self,
        problem: Problem,
        addresses: tuple[int, ...],
        *,
        device: int,
        stream: int,
        allocate: Callable[[int], tuple[int, Any]],
    ) -> None:
        """Queue the problem's graph on a stream; it is built first if this thread has none.

        addresses: of the problem's operands, multiples of 16. device: the number of the device that they are on, which
            must be the current one. stream: the address of one of its streams. allocate: gives the address of so many
            bytes there, and what keeps them; it is let go of once the work is queued.
        Raises UnsupportedError if cuDNN has no kernel for the problem.
        """
        try:
            place = self._here.places[device]
        except (AttributeError, KeyError):
            place = self._opened(device)
        graph = place.graph(problem)
        cudnn.set_stream(place.handle, stream)
        workspace, keeper = allocate(graph.workspace) if graph.workspace else (0, None)
        graph(addresses, workspace, place.handle)
        del keeper

    def _opened(self, device: int) -> _Place:
        places: dict[int, _Place] = self._here.__dict__.setdefault("places", {})
        places[device] = _Place(self._idle[device], self._kept)
        return places[device]


class _Place:
    """One thread's handle on one device, and its graphs.

    When the thread ends the handle waits for another: to destroy it would wait for the device.
    """

    def __init__(self, idle: list[Any], kept: int) -> None:
        self._idle = idle
        try:
            self.handle = idle.pop()
        except IndexError:
            self.handle = cudnn.create_handle()
        self.graph: Callable[[Problem], Graph] = lru_cache(kept)(partial(Graph, handle=self.handle))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._idle.append(self.handle)


def check_library() -> None:
    """Raise MissingDependency if the frontend finds no cuDNN, UnsupportedError if it is too old."""
    try:
        version = cudnn.backend_version()
    except RuntimeError as exc:
        raise MissingDependency(
            "the cuDNN frontend finds no libcudnn.so.9, which Torch for GPUs brings: pip install nvidia-cudnn-cu13 (or "
            "-cu12), or put its folder into LD_LIBRARY_PATH."
        ) from exc
    if version < _LEAST:
        raise UnsupportedError(f"cuDNN is {version}, but {_LEAST} is needed: pip install --upgrade nvidia-cudnn-cu13.")
