"""CuPy's arrays over any ring of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, proxy

import array_api_compat
import cupy

from ringcore import Blocks, Move, Pending, Spec, Transport, UnsupportedError, find_transport
from ringcore_cupy.carriers import Carriers
from ringcore_cupy.partials import check_array
from ringcore_cupy.reach import check_carrier

_rings: WeakKeyDictionary[Transport, Carriers] = WeakKeyDictionary()


class CupyTransport:
    """A ring of CuPy's arrays over a ring of processes; implements `ringcore.OneSided`.

    host: a transport of NumPy's arrays, or what `ringcore.ring_attention` takes for one, such as MPI.COMM_WORLD. It
        carries notes, and blocks where the GPUs cannot. It stays the user's, with its deadline and its ranks.
    carrier: how blocks travel. "ipc": GPUs of one node copy from and to each other's memory; "nccl": as NCCL's
        messages; "mpi": the host transport takes them from the GPU's memory, if its ``device_buffers`` says that it
        can; "host": through pinned memory of the host. None takes for each pair of ranks the first of these that can.

    Making one sends nothing. The ranks' GPUs are those that are current at the first call, where the arrays must be;
    several ranks may share one, but not with "nccl". One call at a time: a second thread needs a ring of its own.

    Attributes: rank, size, node, sharers as in `ringcore.Transport`.
    Raises KeywordError for a carrier that there is not; the first call raises UnsupportedError, on every rank and
    before anything is sent, for one that cannot carry between these ranks.
    """

    def __init__(self, host: Any, *, carrier: str | None = None) -> None:
        check_carrier(carrier)
        found = find_transport(host)
        self._use(found, Carriers(proxy(found), carrier))

    def _use(self, host: Transport, carriers: Carriers) -> None:
        if isinstance(host, CupyTransport):
            raise UnsupportedError("the host of the ring is a CupyTransport. Give the ring of processes under it.")
        self._host, self._carriers = host, carriers
        self.rank, self.size, self.node, self.sharers = host.rank, host.size, host.node, host.sharers

    @property
    def explain(self) -> str:
        """Which pairs of ranks use what, and why."""
        under = type(self._host).__name__
        return f"CuPy over {under}, rank {self.rank} of {self.size}; {self._carriers.explain}"

    @property
    def messages_sent(self) -> int:
        """How many arrays of blocks have left this rank; those that others pull are not counted."""
        return self._carriers.messages_sent

    @property
    def bytes_sent(self) -> int:
        """How many bytes of blocks have left this rank; those that others pull are not counted."""
        return self._carriers.bytes_sent

    @property
    def bytes_published(self) -> int:
        """How many bytes of blocks were made readable for other ranks."""
        return self._carriers.bytes_published

    def check(self, *arrays: Any) -> None:
        """Raise UnsupportedError unless all are CuPy's arrays on the current device, which is this ring's."""
        for x in arrays:
            if not array_api_compat.is_cupy_array(x):
                raise UnsupportedError(
                    f"an array is a {type(x).__module__}.{type(x).__qualname__}; this ring carries CuPy's. Give the "
                    "ring of processes itself, which takes what carries arrays of each library."
                )
            check_array(x)
            came = x.device.id
            if self._carriers.device not in (None, came):
                raise UnsupportedError(
                    f"an array is on GPU {came}, but this ring's memory on rank {self.rank} is that of GPU "
                    f"{self._carriers.device}. Make another ring for it: ring=comm.Dup()."
                )
        stream = cupy.cuda.get_current_stream()
        if stream.ptr not in _DEFAULT_STREAMS and stream.is_capturing():
            raise UnsupportedError(
                "a call on a ring was captured in a graph, but ranks agree on their hosts, which no graph replays."
            )

    def check_schedule(self, schedule: Any, x: Any) -> None:
        """Raise UnsupportedError for CUDA IPC, in which accumulators go on to one rank alone."""
        if not self._carriers.messages_alone:
            raise UnsupportedError(
                f"schedule is {schedule!r}, which orders messages, but this ring may read blocks straight from the "
                "memory of their owner's GPU. Leave it out, or have messages sent: "
                'ring=CupyTransport(comm, carrier="nccl"), or "mpi", or "host".'
            )

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note, in the order of ranks."""
        return self._host.gather(note)

    def reaches(self, reader: int, owner: int) -> bool:
        """Whether ``reader`` can fetch what ``owner`` published; equal on every rank."""
        return self._carriers.reaches(reader, owner)

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]] | None = None,
    ) -> bool:
        """Begin a call: make this rank's blocks readable for the ranks that reach its memory, if any. Collective.

        Raises UnsupportedError, on every rank, if the carrier that was asked for cannot carry.
        """
        self._carriers.publish(blocks, specs, carried or {})
        return True

    def fetch(self, owner: int, rows: slice | None, seen: slice | None = None) -> Blocks:
        """What ``owner`` published, there once the exchange that follows was waited for."""
        return self._carriers.fetch(owner, rows, seen)

    def exchange(
        self,
        kind: str,
        sends: Sequence[tuple[Move, Blocks]],
        receives: Sequence[tuple[Move, Sequence[Spec]]],
    ) -> Pending:
        """Start all sends and receives; blocks stay untouched until the answer's wait returns.

        What arrives is there for work that the caller's stream is given from then on.
        """
        return self._carriers.exchange(kind, sends, receives)

    def retire(self) -> None:
        """The end of a call: no rank reads published blocks, or what was sent, after this. Collective."""
        self._carriers.retire()

    def abort(self, error: BaseException) -> None:
        """Tell every peer that this rank failed; the ring is of no use afterwards."""
        if not self._carriers.refused(error):
            self._host.abort(error)
            self._carriers.abort()

    def close(self) -> None:
        """Free what this ring has on the GPUs; the host's transport stays. Collective.

        A ring that is never closed lasts as long as its host's transport, or until the process ends.
        """
        self._carriers.close()


_DEFAULT_STREAMS = (0, 1)  # CUDA's null stream and its name for it, which no graph is captured from


def carry(host: Transport) -> Transport:
    """The ring of CuPy's arrays over this one; what it has on GPUs is kept as long as ``host``. Sends nothing."""
    if isinstance(host, CupyTransport):
        return host
    carriers = _rings.get(host)
    if carriers is None:
        carriers = _rings[host] = Carriers(proxy(host), None)
    ring = CupyTransport.__new__(CupyTransport)
    ring._use(host, carriers)
    return ring
