"""A ring's own communicators of NCCL, made by torch.distributed."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from ringcore import Blocks, Move, Spec, TransportError
from ringcore_torch.circle import Circle
from ringcore_torch.stream_messages import Letters, StreamMessages
from ringcore_torch.watch import Watch

_COUNTED = 4096  # operations after which their numbers begin anew; no stream has as many waiting
_UNWATCHED = "TORCH_NCCL_BLOCKING_WAIT"


class NcclMessages(StreamMessages):
    """Blocks on GPUs that cannot reach each other's memory, such as those of several machines. Making it is collective.

    device: this rank's GPU.
    """

    def __init__(self, circle: Circle, device: torch.device) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise TransportError(
                "a call over NCCL was captured before it ever ran, but making connections is no work of a stream. Run "
                "the call once on every rank, then capture it."
            )
        begun = threading.Event()
        visiting, carried = _made(circle, device, begun)
        self._watch = Watch(circle, (visiting, carried), begun)
        weakref.finalize(self, self._watch.close).atexit = False  # the watch sees to the end of the process itself
        super().__init__(circle.rank, visiting, carried, circle.check)
        for channel in (visiting, carried):
            _shake_hands(circle, channel, device)

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]],
    ) -> None:
        """Nothing: no rank reads another's blocks in place. The call ends with `retire` all the same."""
        self._check()

    def abort(self) -> None:
        """End what is under way, so that no stream of this rank waits for a peer."""
        self._watch.abort()


class NcclChannel:
    """A communicator with a stream of its own; implements `ringcore_torch.stream_messages.Channel`."""

    def __init__(self, circle: Circle, name: str, device: torch.device, begun: threading.Event) -> None:
        self._circle, self._device, self._begun = circle, device, begun
        # Not a group of torch.distributed's: new_group would make it the user's, and number ranks in its own order.
        group: Any = distributed_c10d.ProcessGroupNCCL  # type: ignore[attr-defined,unused-ignore]
        options = group.Options(is_high_priority_stream=True)  # before tiles that fill the GPU
        options._timeout = timedelta(seconds=circle.timeout)
        with _unwatched():
            self._group: Any = group(PrefixStore(f"nccl {name}", circle.store), circle.rank, circle.size, options)
        self._group.eager_connect_single_device(device)
        self._stream: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        # The number of the last operation that ended, which the stream writes into host memory.
        self._numbers = torch.arange(_COUNTED, device=device)
        self._passed = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._posted = 0

    def ready(self) -> Any:
        """A mark behind all that the caller's stream was given so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def order(self, mark: Any) -> None:
        """What the caller's stream is given from now on begins behind ``mark``."""
        torch.cuda.current_stream(self._device).wait_event(mark)

    def post(self, sends: Letters, receives: Letters, marks: Sequence[Any]) -> Any:
        """Post one group that begins behind ``marks``; the mark behind it."""
        # What a graph replays passes the same number each time, and nobody follows it.
        followed = not torch.cuda.is_current_stream_capturing()
        if followed:
            self._posted = (self._posted + 1) % _COUNTED
            self._begun.set()
        with torch.cuda.stream(self._stream):
            for mark in marks:
                self._stream.wait_event(mark)
            for _, x in receives:
                # An operation that was aborted ends like any other: what did not arrive must show.
                x.fill_(torch.nan)
            with self._broken():
                self._group._start_coalescing()
                try:
                    for peer, x in sends:
                        self._group.send([x.view(-1)], peer, 0)
                    for peer, x in receives:
                        self._group.recv([x.view(-1)], peer, 0)
                finally:  # else all that this thread gives NCCL later, on any communicator, would join the group
                    work = self._group._end_coalescing()
                work.synchronize()  # which this stream does, not the host
            if followed:
                number = self._numbers[self._posted : self._posted + 1]
                self._passed.copy_(number, non_blocking=True)
            return self._stream.record_event()

    def passed(self) -> int:
        """The number of the last operation that ended."""
        return int(self._passed)

    def under_way(self) -> bool:
        """Whether an operation was posted and has not ended."""
        return self.passed() != self._posted

    def abort(self) -> None:
        """End all operations as they are, and take no more."""
        with suppress(RuntimeError), torch.cuda.device(self._device):  # a peer may be gone
            self._group.abort()

    def close(self) -> None:
        """Let go of the connections, once the peers have what was sent."""
        with suppress(RuntimeError), torch.cuda.device(self._device):
            self._group.shutdown()

    @contextmanager
    def _broken(self) -> Iterator[None]:
        """What NCCL refuses, as our error: the reason of the ring's end if that was it."""
        try:
            yield
        except RuntimeError as exc:
            self._circle.check()
            raise TransportError(f"NCCL failed on rank {self._circle.rank}: {exc}") from exc


def _shake_hands(circle: Circle, channel: NcclChannel, device: torch.device) -> None:
    """Let each rank meet all others: what goes home comes from ranks that are no neighbours.

    NCCL connects two ranks at their first message, for which the host waits for the other one, and which a capture
    could not hold. Here all ranks do it at once.
    """
    peers = [(circle.rank + hop) % circle.size for hop in range(1, circle.size)]
    mine, theirs = ([(peer, torch.zeros(1, device=device)) for peer in peers] for _ in range(2))
    channel.order(channel.post(mine, theirs, [channel.ready()]))


def _made(circle: Circle, device: torch.device, begun: threading.Event) -> tuple[NcclChannel, NcclChannel]:
    """Two channels, within the deadline: NCCL itself waits for ever for a rank that could not make its own."""
    found: list[NcclChannel] = []
    failed: list[Exception] = []

    def attempt() -> None:
        try:
            torch.cuda.set_device(device)  # else a new thread works on the first one
            found.extend(NcclChannel(circle, name, device, begun) for name in ("visiting", "carried"))
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=attempt, name="ringcore nccl", daemon=True)
    thread.start()
    deadline = time.monotonic() + circle.timeout
    while thread.is_alive():
        thread.join(0.1)
        if thread.is_alive():
            if error := circle.heard():
                raise error
            if time.monotonic() > deadline:
                raise circle.late("all ranks to make their NCCL communicators")
    if failed:
        raise TransportError(f"NCCL failed on rank {circle.rank}: {failed[0]}") from failed[0]
    visiting, carried = found
    return visiting, carried


@contextmanager
def _unwatched() -> Iterator[None]:
    """Make groups without torch's own watchdog, which is asked for in the environment alone.

    It ends the whole process, and those of all other ranks, when a peer is lost or late. A ring ends with an error on
    every rank instead, by `Watch`.
    """
    before = os.environ.get(_UNWATCHED)
    os.environ[_UNWATCHED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_UNWATCHED]
        else:
            os.environ[_UNWATCHED] = before
