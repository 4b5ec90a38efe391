"""Which GPUs the ranks have, and by what they can reach each other."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch
import torch.distributed as dist

from ringcore import KeywordError, UnsupportedError
from ringcore_torch.circle import Circle

PEER_MEMORY, NCCL = "peer_memory", "nccl"


def check_carrier(carrier: str | None) -> None:
    """Raise KeywordError unless there is a carrier of that name, UnsupportedError if this Torch lacks it."""
    if carrier not in (None, PEER_MEMORY, NCCL):
        raise KeywordError(f'carrier is {carrier!r}; it must be "{PEER_MEMORY}", "{NCCL}" or None, the first that can.')
    if carrier == NCCL and not dist.is_nccl_available():
        raise UnsupportedError(
            'carrier is "nccl", but this Torch was built without NCCL (torch.distributed.is_nccl_available()). Install '
            "a build for CUDA, or move q, k and v to host memory, which gloo carries."
        )


def choose_carrier(circle: Circle, device: torch.device, asked: str | None) -> str:
    """The carrier of blocks on the ranks' GPUs, equal on all of them: the one asked for, or the first that can.

    Collective. Raises UnsupportedError, on every rank, if it cannot carry or none can; KeywordError if the ranks ask
    for different ones.
    """
    mine = {
        "machine": platform.node(),
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
        "asked": asked,
        "nccl": dist.is_nccl_available(),
    }
    notes = _gathered(circle, mine)
    visible = {str(torch.cuda.get_device_properties(n).uuid): n for n in range(torch.cuda.device_count())}
    far = [
        rank for rank, note in enumerate(notes)
        if rank != circle.rank and not _reaches(device, visible.get(note["gpu"]), asked)
    ]  # fmt: skip
    return decide(notes, _gathered(circle, far))


def _reaches(device: torch.device, peer: int | None, asked: str | None) -> bool:
    """Whether the device reaches that GPU; of one that this process does not see only its user can know."""
    if peer is None:
        return asked == PEER_MEMORY
    return bool(peer == device.index or torch.cuda.can_device_access_peer(device.index, peer))


def decide(notes: list[dict[str, Any]], far: list[list[int]]) -> str:
    """The carrier for ranks of these notes; ``far`` lists the ranks whose GPUs each is not known to reach."""
    asked = [note["asked"] for note in notes]
    if len(set(asked)) > 1:
        raise KeywordError(f"the ranks ask for different carriers: {asked}. Every rank must make the same ring.")
    gpus = [note["machine"] + note["gpu"] for note in notes]
    shared = [rank for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]
    if shared:
        raise UnsupportedError(
            f"the ranks {shared} share a GPU, but each needs one of its own. Call torch.cuda.set_device with the "
            "number of the process on its machine (LOCAL_RANK under torchrun) before tensors are made."
        )
    apart = ""
    if len({note["machine"] for note in notes}) > 1:
        apart = "they are on several machines"
    elif any(far):
        apart = f"the ranks whose GPUs each rank does not reach, or not see, are {far}"
    lacking = [rank for rank, note in enumerate(notes) if not note["nccl"]]
    if asked[0] != NCCL and not apart:
        return PEER_MEMORY
    if asked[0] == PEER_MEMORY:
        raise UnsupportedError(
            f"the ranks' GPUs cannot reach each other's memory ({apart}), which carrier={PEER_MEMORY!r} needs. Leave "
            f"it out, and NCCL carries the blocks."
        )
    if lacking:
        reason = f"the ranks' GPUs cannot reach each other's memory ({apart}), and " if apart else ""
        raise UnsupportedError(
            f"{reason}Torch was built without NCCL on the ranks {lacking}. Install a build for CUDA there, or move q, "
            "k and v to host memory, which gloo carries: q.cpu()."
        )
    return NCCL


def _gathered(circle: Circle, note: Any) -> list[Any]:
    return [json.loads(answer) for answer in circle.gather(json.dumps(note).encode())]
