"""Which GPUs the ranks have, and by what they can reach each other."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupy.cuda import nccl, runtime

from ringcore import KeywordError, Transport, UnsupportedError
from ringcore_cupy.notes import gathered

IPC, NCCL, MPI, HOST = "ipc", "nccl", "mpi", "host"
CARRIERS = (IPC, NCCL, MPI, HOST)

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # one machine's, also in several containers


@dataclass(frozen=True)
class Ways:
    """By what blocks travel; equal on every rank.

    near: for each rank the ranks whose memory it reaches. others: what can carry between all ranks, the best first.
    why: why not a better one.
    """

    near: tuple[frozenset[int], ...]
    others: tuple[str, ...]
    why: str = ""

    @property
    def complete(self) -> bool:
        """Whether all ranks reach each other's memory."""
        return all(len(peers) == len(self.near) - 1 for peers in self.near)


def check_carrier(carrier: str | None) -> None:
    """Raise KeywordError unless there is a carrier of that name."""
    if carrier not in (None, *CARRIERS):
        raise KeywordError(
            f"carrier is {carrier!r}; it must be one of {', '.join(CARRIERS)}, or None for the best that each pair of "
            "ranks can take."
        )


def find_ways(host: Transport, asked: str | None) -> Ways:
    """How blocks travel among the ranks' current GPUs. Collective.

    Raises, on every rank, KeywordError if the ranks ask for different carriers, UnsupportedError if the one asked for
    cannot carry.
    """
    device = runtime.getDevice()
    notes = gathered(
        host,
        {
            "asked": asked,
            "node": host.node,
            "machine": _BOOT.read_text().strip() if _BOOT.exists() else platform.node(),
            "gpu": runtime.deviceGetPCIBusId(device),
            "uuid": _uuid(device),
            "nccl": bool(nccl.available),
            "device memory": bool(getattr(host, "device_buffers", False)),
        },
    )
    return decide(notes, gathered(host, unreached(notes, host.rank, device)))


def unreached(notes: Sequence[dict[str, Any]], rank: int, device: int) -> dict[str, str]:
    """Whose GPU's memory this rank does not reach, and why.

    GPUs are known by their place on the bus, as numbers differ between processes that see different ones; and by
    their UUIDs, as the parts of a GPU in MIG mode share the place. CuPy ends a UUID at a byte of 0, so it takes both.
    """
    visible = {(runtime.deviceGetPCIBusId(number), _uuid(number)): number for number in range(runtime.getDeviceCount())}
    found = {}
    for peer, note in enumerate(notes):
        gpu = note["gpu"], note["uuid"]
        if (note["node"], note["machine"]) != (notes[rank]["node"], notes[rank]["machine"]):
            found[str(peer)] = "they are on different nodes"
        elif gpu not in visible:
            which = f"{note['gpu']} with UUID {note['uuid']}"
            found[str(peer)] = f"rank {rank} does not see the GPU {which} (CUDA_VISIBLE_DEVICES)"
        elif visible[gpu] != device and not runtime.deviceCanAccessPeer(device, visible[gpu]):
            found[str(peer)] = f"the GPU {notes[rank]['gpu']} cannot access {note['gpu']}"
    return found


def decide(notes: Sequence[dict[str, Any]], reasons: Sequence[dict[str, str]]) -> Ways:
    """The ways for ranks of these notes; ``reasons`` says for each whom it does not reach, and why."""
    size = len(notes)
    asked = [note["asked"] for note in notes]
    if len(set(asked)) > 1:
        raise KeywordError(f"the ranks ask for different carriers: {asked}. Every rank must make the same ring.")
    apart = {
        (a, b): reasons[a].get(str(b)) or reasons[b].get(str(a))
        for a in range(size) for b in range(size)
        if a != b and (str(b) in reasons[a] or str(a) in reasons[b])
    }  # fmt: skip
    lacking = {NCCL: _without_nccl(notes), MPI: _without_device_buffers(notes), HOST: ""}
    if asked[0] == IPC:
        if apart:
            (a, b), why = next(iter(apart.items()))
            raise UnsupportedError(
                f'carrier is "ipc", but rank {a} does not reach the memory of rank {b}: {why}. Leave the carrier out, '
                "and each pair of ranks takes what it can."
            )
        return Ways(tuple(frozenset(range(size)) - {rank} for rank in range(size)), ())
    if asked[0] is not None:
        if why := lacking[asked[0]]:
            raise UnsupportedError(f"carrier is {asked[0]!r}, but {why}")
        return Ways((frozenset(),) * size, (asked[0],), "as asked for")
    near = tuple(frozenset(b for b in range(size) if b != a and (a, b) not in apart) for a in range(size))
    others = tuple(name for name in (NCCL, MPI, HOST) if not lacking[name])
    if not apart:
        return Ways(near, others)
    (a, b), why = next(iter(apart.items()))
    passed = [lacking[name] for name in (NCCL, MPI, HOST)[: (NCCL, MPI, HOST).index(others[0])]]
    return Ways(near, others, " ".join([f"ranks {a} and {b} do not share memory: {why}.", *passed]))


def _uuid(device: int) -> str:
    return bytes(runtime.getDeviceProperties(device)["uuid"]).hex()


def _without_nccl(notes: Sequence[dict[str, Any]]) -> str:
    gpus = [(note["machine"], note["gpu"]) for note in notes]
    shared = [rank for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]
    if shared:
        return (
            f"the ranks {shared} share a GPU, and NCCL wants one for each. Call cupy.cuda.Device(number).use() with "
            "the rank's number on its machine before arrays are made."
        )
    lacking = [rank for rank, note in enumerate(notes) if not note["nccl"]]
    return (
        f"CuPy finds no NCCL on the ranks {lacking}: pip install nvidia-nccl-cu13 (or -cu12, as CuPy's)."
        if lacking
        else ""
    )


def _without_device_buffers(notes: Sequence[dict[str, Any]]) -> str:
    lacking = [rank for rank, note in enumerate(notes) if not note["device memory"]]
    return (
        f"the host transport of the ranks {lacking} does not say that it takes a GPU's memory. If the MPI library is "
        "CUDA-aware but cannot tell, say so: ringcore_mpi.MpiTransport(comm, device_buffers=True)."
        if lacking
        else ""
    )
