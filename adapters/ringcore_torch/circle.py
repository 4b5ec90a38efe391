"""The control plane of a ring over torch.distributed: notes on the host, deadlines, and news of failure.

How blocks move is not decided here; gloo carries the notes whatever carries the blocks.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from ringcore import KeywordError, PeerError, RingTimeout, TransportError
from ringcore_torch.mailbox import Mailbox, open_mailbox

_log = logging.getLogger(__name__)  # for what no later call may be there to raise

_NOTE_TAG = 0
_NEVER_SENT_TAG = 1
FIRST_BLOCK_TAG = 2

_NOTE = 1024  # bytes of a note that travel in its first message, its length included
_LENGTH = struct.Struct("<q")
_GRACE = 1.0  # seconds for the news of a failure to arrive after its connection broke
_FAILED = "failed"  # where a ring's store holds that news


class Circle:
    """The members of ``group`` with connections of their own, so that a ring's messages never meet the user's.

    name: what tells this ring from others over the same group; equal on all ranks. gloo: the connections.
    store: where all of them read and write. stopped: the failure that ended this ring, or None. Making one is
    collective.
    """

    def __init__(self, group: ProcessGroup, name: str, timeout: float | None) -> None:
        self.timeout = _seconds(timeout)
        self.rank, self.size = group.rank(), group.size()
        self.stopped: BaseException | None = None
        self.store = PrefixStore(f"ringcore/{name}", group.get_group_store())
        self._untold: BaseException | None = None
        self._lock = threading.Lock()
        self._open, self._owner = 0, 0
        self._mailbox: Mailbox | None = None
        try:
            # Not a group of torch.distributed's: new_group numbers ranks in an order of its own.
            self.gloo: Any = ProcessGroupGloo(self.store, self.rank, self.size, timedelta(seconds=self.timeout))
        except RuntimeError as exc:
            raise RingTimeout(
                f"rank {self.rank} waited {self.timeout:g} s for all {self.size} ranks to enter the ring. Every rank "
                f"of the process group must make the call. ({exc})"
            ) from exc
        self._mailbox = open_mailbox(self.gather, self.rank, self.size, _NOTE)

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note, in the order of ranks.

        Raises RingTimeout, PeerError, or TransportError if another thread is in a call.
        """
        self.check()
        with self._alone():
            room = _NOTE - _LENGTH.size
            first = self._first(_LENGTH.pack(len(note)) + note[:room].ljust(room, b"\0"))
            lengths = [_LENGTH.unpack_from(part)[0] for part in first]
            rest = self._gathered(note[room:], [max(0, length - room) for length in lengths])
            parts = zip(first, rest, lengths, strict=True)
            return tuple(head[_LENGTH.size :][:length] + tail for head, tail, length in parts)

    def check(self) -> None:
        """Raise TransportError if an earlier call ended this ring, or the failure itself if nobody was told yet."""
        if self._untold is not None:
            error, self._untold = self._untold, None
            raise error
        if self.stopped is not None:
            raise TransportError(
                f"this ring ended when an earlier call failed ({_describe(self.stopped)}). Make a new process group, "
                "on every rank: torch.distributed.new_group(...)."
            ) from self.stopped

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around the start of blocks, which are open until `finished`."""
        self.check()
        with self._alone():
            self._open += 1
            yield

    def finished(self) -> None:
        """What was started has ended."""
        with self._lock:
            self._open -= 1

    def begin(self, operation: Callable[..., Any], x: torch.Tensor, peer: int, tag: int, waiting_for: str) -> Any:
        """Start ``gloo.send`` or ``gloo.recv`` of a contiguous tensor; a connection that broke becomes our error."""
        try:
            return operation([x], peer, tag)
        except RuntimeError as exc:
            self._fail(exc, waiting_for, late=False)

    def wait(self, work: Any, waiting_for: str, deadline: float) -> None:
        """Wait until ``work`` is done; raises RingTimeout at the deadline (monotonic), PeerError if a peer failed."""
        left = max(0.001, deadline - time.monotonic())  # gloo counts milliseconds, and takes 0 for ever
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as exc:
            self._fail(exc, waiting_for, late=time.monotonic() >= deadline - 0.01)

    def abort(self, error: BaseException) -> None:
        """Tell every peer that this rank failed, and break the connections on which they wait."""
        if self.stopped is not None:
            return
        self.stopped = error
        with suppress(RuntimeError):  # the store may have gone with its process
            # The first failure is the reason of all others.
            self.store.compare_set(_FAILED, "", f"{self.rank} {_describe(error)}")
        if self._mailbox is not None:
            self._mailbox.stop()
        never = torch.empty(1, dtype=torch.uint8)
        for peer in self._peers():
            # A wait that times out closes every connection of its group; neither abort() nor letting go of the group
            # does while a part of it is in use. A peer that is gone ends its own wait at once, and closes no other.
            with suppress(RuntimeError):
                self.gloo.recv([never], peer, _NEVER_SENT_TAG).wait(timedelta(milliseconds=1))

    def _first(self, mine: bytes) -> list[bytes]:
        """The first _NOTE bytes of every rank's note."""
        if self._mailbox is None:
            return self._gathered(mine, [_NOTE] * self.size)
        return self._mailbox.gathered(mine, time.monotonic() + self.timeout, self._look_after)

    def _look_after(self, peer: int, late: bool) -> None:
        """Raise if it is too late for the peer's note, if the peer is gone, or if a rank failed."""
        why = "no note came" if late or self.heard() is not None else ""
        if self._mailbox is not None:
            if stopped := self._mailbox.stopped():
                why = f"rank {stopped[0]} failed"
            elif not self._mailbox.lives(peer):
                why = f"the process of rank {peer} has ended"
        if why:
            self._fail(RuntimeError(why), f"rank {peer} to take part in the call", late=late)

    def end(self, error: BaseException) -> None:
        """As `abort`, from a thread beside the calls: the next call raises the error."""
        if self.stopped is None:
            self._untold = error
            _log.error("the ring of rank %d ended, and what was under way is not to be used: %s", self.rank, error)
            self.abort(error)

    def heard(self, patience: float = 0.0) -> PeerError | None:
        """What a peer that failed has told, within so many seconds."""
        end = time.monotonic() + patience
        with suppress(RuntimeError):
            while True:
                if self.store.check([_FAILED]):
                    rank, _, words = self.store.get(_FAILED).decode(errors="replace").partition(" ")
                    return PeerError(f"rank {rank} failed, so rank {self.rank} stopped too: {words}")
                if time.monotonic() >= end:
                    break
                time.sleep(0.02)
        return None

    def late(self, waiting_for: str) -> RingTimeout:
        """The error of a rank whose deadline has passed."""
        return RingTimeout(
            f"rank {self.rank} waited {self.timeout:g} s for {waiting_for}. A rank may be stuck, gone, or not have "
            "made this call; if it is only slow, raise RINGCORE_TIMEOUT (seconds)."
        )

    def _gathered(self, mine: bytes, lengths: list[int]) -> list[bytes]:
        """Every rank's bytes, of these lengths."""
        parts = [bytearray(length) for length in lengths]
        parts[self.rank][:] = mine
        deadline = time.monotonic() + self.timeout
        works = []
        for peer in self._peers():
            waiting_for = f"rank {peer} to take part in the call"
            for operation, part in ((self.gloo.recv, parts[peer]), (self.gloo.send, parts[self.rank])):
                if part:
                    x = torch.frombuffer(part, dtype=torch.uint8)
                    works.append((self.begin(operation, x, peer, _NOTE_TAG, waiting_for), waiting_for))
        for work, waiting_for in works:
            self.wait(work, waiting_for, deadline)
        return [bytes(part) for part in parts]

    def _peers(self) -> list[int]:
        """All other ranks, the next one first."""
        return [(self.rank + hop) % self.size for hop in range(1, self.size)]

    def _fail(self, cause: RuntimeError, waiting_for: str, late: bool) -> NoReturn:
        """Raise what a failed operation means: a peer's own words if it told them."""
        self.check()
        error: PeerError | RingTimeout | None = self.heard(0.0 if late else _GRACE)
        if error is None and late:
            error = self.late(waiting_for)
        elif error is None:
            error = PeerError(
                f"a connection of rank {self.rank} broke while it waited for {waiting_for}: a rank is gone ({cause})"
            )
        self.abort(error)
        raise error from cause

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One call of one thread; if it fails, every peer is told."""
        entered = self._lock.acquire(blocking=False)
        if entered and (self._open == 0 or self._owner == threading.get_ident()):
            self._owner = threading.get_ident()
            try:
                yield
            except BaseException as error:  # an interrupt, say: the peers wait for this rank
                self.abort(error)
                raise
            finally:
                self._lock.release()
            return
        if entered:
            self._lock.release()
        intrusion = TransportError(
            f"rank {self.rank} made a call while another of its threads was in one on the same ring. One call at a "
            "time per ring: give the second thread a process group of its own."
        )
        self.abort(intrusion)
        raise intrusion


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _seconds(given: float | None) -> float:
    text = os.environ.get("RINGCORE_TIMEOUT", "120") if given is None else given
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < 1e9:
        name = "RINGCORE_TIMEOUT" if given is None else "timeout"
        raise KeywordError(f"{name} is {text!r}; it must be a number of seconds above 0.")
    return seconds
