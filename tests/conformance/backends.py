"""The array libraries and rings that the suite runs on: arrays in, arrays out, as NumPy."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import pytest
from cases import Case, either_half_cases, half_cases, half_layout_cases
from launched import world

import ringcore
from ringcore import find_ring

Cases = Callable[[tuple[int, ...]], list[Case]]

INPUTS = ("q", "k", "v")  # those that are split
ROWS = (*INPUTS, "prefix_k", "prefix_v")  # those with a sequence axis


class Backend:
    """One array library; `make` and `back` convert from and to NumPy."""

    name = "numpy"
    kernels: str | None = None
    further_cases: tuple[Cases, ...] = (half_cases,)

    @staticmethod
    def gpus() -> list[str]:
        """The names of the GPUs that it can compute on."""
        return []

    def make(self, x: np.ndarray) -> Any:
        """A NumPy array as this library's."""
        return x

    def back(self, x: Any) -> np.ndarray:
        """This library's array as NumPy."""
        return np.asarray(x)


class Strict(Backend):
    """array-api-strict on a device that is not its default, where any use of the default fails."""

    name = "strict"
    further_cases = ()  # the standard has no half types

    @cached_property
    def xp(self) -> Any:
        import array_api_strict

        return array_api_strict

    def make(self, x: np.ndarray) -> Any:
        return self.xp.asarray(x, device=self.xp.Device("device1"))

    def back(self, x: Any) -> np.ndarray:
        assert x.device == self.xp.Device("device1")
        return np.asarray(x.to_device(self.xp.Device("CPU_DEVICE")))


class Torch(Backend):
    """Torch on the CPU."""

    name = "torch"
    device = "cpu"
    further_cases = (half_cases, half_layout_cases)

    def make(self, x: np.ndarray) -> Any:
        import torch

        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(x.copy()).to(self.device)

    def back(self, x: Any) -> np.ndarray:
        import torch

        assert x.device.type == self.device
        if x.dtype == torch.bfloat16:
            return x.cpu().view(torch.uint16).numpy().view("bfloat16")
        return x.cpu().numpy()


class TorchCuda(Torch):
    """Torch on a GPU."""

    name = "torch-cuda"
    device = "cuda"

    def __init__(self) -> None:
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # torchrun's number of this process

    @staticmethod
    def gpus() -> list[str]:
        import torch

        return [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]


class Cupy(Backend):
    """CuPy."""

    name = "cupy"

    def __init__(self) -> None:
        from cupy import cuda

        cuda.Device(world()[0] % cuda.runtime.getDeviceCount()).use()

    @staticmethod
    def gpus() -> list[str]:
        from cupy.cuda import runtime

        return [runtime.getDeviceProperties(n)["name"].decode() for n in range(runtime.getDeviceCount())]

    def make(self, x: np.ndarray) -> Any:
        import cupy

        return cupy.asarray(x)

    def back(self, x: Any) -> np.ndarray:
        import cupy

        return cupy.asnumpy(x)


class Jax(Backend):
    """JAX, eager."""

    name = "jax"
    further_cases = (either_half_cases,)  # it compiles every operation for every shape

    @cached_property
    def np(self) -> Any:
        import jax

        jax.config.update("jax_enable_x64", True)
        return jax.numpy

    def make(self, x: np.ndarray) -> Any:
        return self.np.asarray(x)


class NumpyReference(Backend):
    """NumPy arrays on the reference kernels."""

    name = "numpy-reference"
    kernels = "reference"


BACKENDS = {cls.name: cls for cls in (Backend, NumpyReference, Strict, Torch, TorchCuda, Cupy, Jax)}


class LocalRing:
    """Rings in one process."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @staticmethod
    def largest() -> int:
        """The size of the largest ring."""
        return 8

    def __call__(self, arrays, keywords, layouts, size, axes, wrt=None):
        """out, lse and gradients as NumPy [B, H, S, ...], or None on a process outside the ring."""
        return _call(self.backend, arrays, keywords, axes, wrt, ring_size=size, **layouts)


@dataclass(frozen=True)
class Group:
    """Some ranks of the world, and the ring that they make: ``allgather`` gives every member's object."""

    rank: int
    ring: Any
    allgather: Callable[[Any], list[Any]]


class ProcessRing:
    """Rings of processes, among ``size`` ranks of the world; one world lasts for the whole session."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.groups: dict[int, Group | None] = {}

    def group(self, size: int) -> Group | None:
        """The ring of so many ranks, which are not the same as in the world; None on all others. Collective."""
        raise NotImplementedError

    def __call__(self, arrays, keywords, layouts, size, axes, wrt=None):
        """As LocalRing; every rank of the ring gets the whole results."""
        if size not in self.groups:
            self.groups[size] = self.group(size)
        group = self.groups[size]
        if group is None:
            return None
        lengths = arrays["q"].shape[2], arrays["k"].shape[2]
        given = [layouts.get(name, layouts.get("layout")) for name in ("q_layout", "k_layout")]
        dealt = [ringcore.resolve_layout(*each, size) for each in zip(given, lengths, strict=True)]
        mine = {name: ringcore.shard(x, dealt[name in ("k", "v")], group.rank, size) for name, x in arrays.items()}
        local = dict(keywords)
        for name in ("bias", "mask"):
            term = local.get(name)
            if isinstance(term, np.ndarray) and term.ndim >= 2 and term.shape[-2] not in (1,):
                local[name] = ringcore.shard(term, dealt[0], group.rank, size, axis=term.ndim - 2)
        whole = keywords.get("decoded") == "whole" and wrt is None
        if whole:
            mine["q"] = arrays["q"]
        result = _call(self.backend, mine, local, axes, wrt, ring=group.ring, **layouts)
        if whole:
            rows = (ringcore.shard(x, dealt[0], group.rank, size) for x in result[:2])
            result = *rows, result[2]
        return self._joined(result, group, dealt, keywords)

    def _joined(self, result, group, layouts, keywords):
        out, lse, gradients = result

        def whole(x, place, axis=2):
            return ringcore.unshard([part.copy() for part in group.allgather(x)], layouts[place], axis)

        joined = {}
        for name, x in gradients.items():
            if name == "bias" and keywords["bias"].ndim >= 2 and keywords["bias"].shape[-2] != 1:
                joined[name] = whole(x, 0, x.ndim - 2)
            elif name not in INPUTS:
                shares = group.allgather(x)
                if keywords.get("reduce_replicated"):
                    assert all((share == shares[0]).all() for share in shares), f"d{name} differs between ranks"
                    shares = shares[:1]
                joined[name] = sum(shares)
            else:
                joined[name] = whole(x, name != "q")
        return whole(out, 0), whole(lse, 0), joined


class MpiRing(ProcessRing):
    """MPI processes; ``node_size`` ranks at a time count as one machine."""

    node_size: int | None = None

    @staticmethod
    def largest() -> int:
        from mpi4py import MPI

        return MPI.COMM_WORLD.size

    def group(self, size: int) -> Group | None:
        from mpi4py import MPI

        from ringcore_mpi import MpiTransport

        world = MPI.COMM_WORLD
        comm = world.Split(0 if world.rank < size else MPI.UNDEFINED, -world.rank)
        if comm == MPI.COMM_NULL:
            return None
        ring = comm if self.node_size is None else MpiTransport(comm, node=comm.rank // self.node_size)
        return Group(comm.rank, self.over(ring), comm.allgather)

    def over(self, ring: Any) -> Any:
        """What carries the arrays over the ring of processes."""
        return ring


class MpiNodesRing(MpiRing):
    """MPI processes as if on several machines."""

    node_size = 2


class GridRing(ProcessRing):
    """Grids of the ranks of a ring: groups of two deal heads, where k and v have an even number, else of one.

    What a grid cannot deal by heads it must refuse, on every rank.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.of_heads: dict[int, dict[int, Group | None]] = {}

    def __call__(self, arrays, keywords, layouts, size, axes, wrt=None):
        self.heads = 2 if size % 2 == 0 and arrays["k"].shape[1] % 2 == 0 else 1
        self.groups = self.of_heads.setdefault(self.heads, {})
        # Decoding and keys in two halves are of rings alone: here the whole is attention as ever.
        keywords = {name: x for name, x in keywords.items() if name not in ("decoded", "resumed", "schedule")}
        terms = (isinstance(keywords.get(name), np.ndarray) for name in ("bias", "mask"))
        if "segment_lengths" not in keywords and not any(terms):
            return super().__call__(arrays, keywords, layouts, size, axes, wrt)
        if size not in self.groups:
            self.groups[size] = self.group(size)
        if self.groups[size] is not None:
            with pytest.raises(ringcore.UnsupportedError, match="grid"):
                super().__call__(arrays, keywords, layouts, size, axes, wrt)
        return None


class MpiGridRing(GridRing, MpiRing):
    """Grids of MPI processes."""

    def over(self, ring: Any) -> Any:
        rank, heads = ring.Get_rank(), self.heads
        return ring.Split(rank % heads, rank), ring.Split(rank // heads, rank)


class CupyRing(MpiRing):
    """CuPy's arrays over MPI, all by the carrier that a subclass names."""

    carrier: str

    def over(self, ring: Any) -> Any:
        from ringcore_cupy import CupyTransport

        return CupyTransport(ring, carrier=self.carrier)


class CupyIpcRing(CupyRing):
    """As CUDA's handles between processes alone."""

    carrier = "ipc"


class CupyNcclRing(CupyRing):
    """As NCCL's messages alone."""

    carrier = "nccl"


class CupyHostRing(CupyRing):
    """Through pinned memory alone."""

    carrier = "host"


class CupyMpiRing(CupyRing):
    """As MPI's messages from a GPU's memory, which the MPI library must know itself or RINGCORE_CUDA_AWARE=1 say."""

    carrier = "mpi"

    def over(self, ring: Any) -> Any:
        from ringcore_mpi import MpiTransport

        aware = True if os.environ.get("RINGCORE_CUDA_AWARE") == "1" else None
        return super().over(MpiTransport(ring, device_buffers=aware))


class GlooRing(ProcessRing):
    """Processes under torchrun, over gloo."""

    @staticmethod
    def largest() -> int:
        return int(os.environ["WORLD_SIZE"])

    def group(self, size: int) -> Group | None:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        # Reversed where Torch can, so that ranks of the ring are not ranks of the world.
        kept = {"sort_ranks": False} if "sort_ranks" in signature(dist.new_group).parameters else {}
        group = dist.new_group(list(range(size - 1, -1, -1)), **kept)
        if dist.get_rank() >= size:
            return None

        def allgather(x: Any) -> list[Any]:
            found = [None] * size
            dist.all_gather_object(found, x, group=group)
            return found

        return Group(dist.get_rank(group), group, allgather)


class GlooGridRing(GridRing, GlooRing):
    """Grids of processes under torchrun, over gloo."""

    def group(self, size: int) -> Group | None:
        import torch.distributed as dist

        found = super().group(size)
        kept = {"sort_ranks": False} if "sort_ranks" in signature(dist.new_group).parameters else {}
        ranks = range(size - 1, -1, -1) if kept else range(size)
        grid = np.array(ranks).reshape(-1, self.heads).tolist()
        between = [dist.new_group(list(column), **kept) for column in zip(*grid, strict=True)]
        inside = [dist.new_group(row, **kept) for row in grid]
        if found is None:
            return None
        return replace(found, ring=(between[found.rank % self.heads], inside[found.rank // self.heads]))


class NcclRing(GlooRing):
    """As GlooRing, but tensors on GPUs go as NCCL's messages even where GPUs reach each other's memory."""

    def group(self, size: int) -> Group | None:
        from ringcore_torch import TorchTransport

        found = super().group(size)
        return None if found is None else replace(found, ring=TorchTransport(found.ring, carrier="nccl"))


RINGS = {
    "local": LocalRing,
    "mpi": MpiRing,
    "mpi-nodes": MpiNodesRing,
    "mpi-grid": MpiGridRing,
    "cupy-ipc": CupyIpcRing,
    "cupy-nccl": CupyNcclRing,
    "cupy-mpi": CupyMpiRing,
    "cupy-host": CupyHostRing,
    "gloo": GlooRing,
    "gloo-grid": GlooGridRing,
    "nccl": NcclRing,
}


def _call(backend, arrays, keywords, axes, wrt, **where):
    def given(x):
        return np.swapaxes(x, 1, 2) if axes == "bshd" and x.ndim == 4 else x

    q, k, v, dout, dlse = (backend.make(given(arrays[name])) for name in ("q", "k", "v", "dout", "dlse"))
    on_host = ("documents",)
    keywords = {
        name: backend.make(x) if isinstance(x, np.ndarray) and name not in on_host else x
        for name, x in keywords.items()
    }
    if "prefix" in keywords:
        keywords["prefix"] = tuple(backend.make(given(x)) for x in keywords["prefix"])
    keywords = {**keywords, **where, "axes": axes, "kernels": backend.kernels}
    attention, with_pullback = ringcore.ring_attention, ringcore.ring_attention_vjp
    if "schedule" in keywords:
        keywords = _scheduled(q, k, v, keywords)
    if "segment_lengths" in keywords:
        attention, with_pullback = ringcore.dilated_attention, ringcore.dilated_attention_vjp
    decoded = keywords.pop("decoded", None)
    if decoded is not None and wrt is None:
        return _decoded(backend, q, k, v, keywords, decoded == "dealt", given)
    keys = keywords.pop("resumed", None)
    if keys is not None and wrt is None:  # half of the keys first
        half = backend.make(np.arange(keys)[None, :] % 2 == 0)
        first = attention(q, k, v, **keywords, mask=half, return_partial=True)
        keywords |= {"partial": first, "mask": ~half}
    if wrt is None:
        keywords.pop("reduce_replicated", None)
        out, lse = attention(q, k, v, return_lse=True, **keywords)
        gradients = ()
    else:
        (out, lse), pullback = with_pullback(q, k, v, wrt=wrt, **keywords)
        gradients = pullback(dout, dlse)
    assert str(out.dtype) == str(q.dtype)
    named = {name: backend.back(x) for name, x in zip(wrt or (), gradients, strict=True)}
    named = {name: given(x) if name in ROWS else x for name, x in named.items()}
    return given(backend.back(out)), backend.back(lse), named


def _decoded(backend, q, k, v, keywords, dealt, given):
    if "layout" not in keywords:
        keywords |= {"layout": keywords.pop("k_layout")}
    of_q = keywords.pop("q_layout", keywords["layout"])
    out, lse = ringcore.decode_attention(q, k, v, q_layout=of_q if dealt else None, **keywords)
    return given(backend.back(out)), backend.back(lse), {}


def _scheduled(q, k, v, keywords):
    """With inner rings as long as can be; and without a schedule where the ring must refuse it, and does."""
    transport = None if "ring" not in keywords else find_ring(keywords["ring"], like=q)
    size = keywords["ring_size"] if transport is None else transport.size
    if keywords["schedule"] == "double":
        inner = max((ranks for ranks in range(1, size) if size % ranks == 0), default=1)
        keywords = {**keywords, "schedule": ringcore.DoubleRing(inner)}
    if size == 1 or not hasattr(transport, "check_schedule"):
        return keywords
    try:
        transport.check_schedule(keywords["schedule"], q)
    except ringcore.UnsupportedError:
        with pytest.raises(ringcore.UnsupportedError, match="schedule is"):
            ringcore.ring_attention(q, k, v, **keywords)
        keywords = {name: x for name, x in keywords.items() if name != "schedule"}
    return keywords
