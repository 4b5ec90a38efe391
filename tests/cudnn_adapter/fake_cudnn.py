"""A stand-in for the module ``cudnn``: it computes on the host, and refuses or goes wrong where cuDNN does."""

from __future__ import annotations

import ctypes
import math
import sys
from contextlib import contextmanager
from enum import Enum
from types import ModuleType

import torch

FLOATS = {"HALF": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT": torch.float32, "INT32": torch.int32}
LARGEST = 88.7  # whose exp is still a float32
LOWEST = torch.finfo(torch.float32).min
EMPTY = {
    "infinite": "lse -inf, out NaN",
    "lowest": "lse the lowest float32, out the average of all values",
}  # What is said of a row without keys, where kernels may differ.


class NotSupported(Exception):
    pass


class Handle:
    def __init__(self):
        self.stream, self.backend_handle = 0, id(self)


class Tensor:
    def __init__(self, dim=None, stride=None, data_type=None, uid=None, name=""):
        self.dim, self.stride, self.kind, self.uid, self.name = dim, stride, data_type, uid, name

    def set_output(self, output):
        return self

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, kind):
        self.kind = kind
        return self

    def at(self, address):
        """The tensor that lies there."""
        if address % 16:
            raise RuntimeError(f"{self.name} is at {address}: misaligned address")
        dtype = FLOATS[self.kind.name]
        size = (1 + sum((n - 1) * step for n, step in zip(self.dim, self.stride, strict=True))) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).as_strided(self.dim, self.stride)

    def check_rows(self):
        numbers = 16 // FLOATS[self.kind.name].itemsize
        if self.stride[3] != 1:
            raise NotSupported(f"{self.name}: the last stride is {self.stride[3]}")
        if any(step % numbers for step, n in zip(self.stride[:3], self.dim, strict=False) if n > 1):
            raise NotSupported(f"{self.name}: strides {self.stride} across 16 bytes")


class Plan:
    cpp_index = 3


class Native:
    """What a graph of the frontend holds, which runs it on the addresses of its tensors, sorted by their numbers."""

    def __init__(self, graph):
        self.graph = graph

    def _prepare_variant_pack_template(self):
        self.uids = sorted(tensor.uid for tensor in (*self.graph.tensors, *self.graph.results))

    def _get_variant_pack_uids_sorted(self):
        return self.uids

    def _execute_with_raw_ptrs(self, pointers, count, workspace, handle, plan):
        assert plan == Plan.cpp_index
        pointers = (ctypes.c_void_p * count).from_address(pointers)
        handle = next(known for known in self.graph.module.handles if known.backend_handle == handle)
        self.graph.run(dict(zip(self.uids, pointers, strict=True)), workspace, handle)


class Graph:
    """As ``cudnn.pygraph``; ``built`` of the module counts these."""

    selected_engine = None  # cuDNN itself runs it

    def __init__(self, module, **kinds):
        self.module, self.terms, self.tensors = module, {}, []
        self.plans, self._plan_index = [Plan()], 0
        if module.inside:
            self._lowered_graph = Native(self)

    def tensor(self, **keywords):
        self.tensors.append(Tensor(**keywords))
        return self.tensors[-1]

    def sdpa(self, *, generate_stats, **terms):
        assert generate_stats
        self.terms, self.gradient = terms, False
        self.results = Tensor(name="O"), Tensor(name="Stats")
        return self.results

    def sdpa_backward(self, **terms):
        self.terms, self.gradient = terms, True
        self.results = Tensor(name="dQ"), Tensor(name="dK"), Tensor(name="dV")
        return self.results

    def build(self, modes):
        terms = self.terms
        rows, keys = terms["q"].dim[2], terms["k"].dim[2]
        left, right = terms.get("diagonal_band_left_bound"), terms.get("diagonal_band_right_bound")
        if right is not None and right < 0:
            raise ValueError("right bound needs to be larger than or equal to zero")
        if left is not None and (left <= 0 or rows > keys):
            raise NotSupported(f"left bound {left} on {rows} x {keys}")
        if rows == keys == 1:
            raise NotSupported("one row and one key")
        for name in ("q", "k", "v", "o", "dO", "bias"):
            if name in terms:
                terms[name].check_rows()
            if name in terms and name != "bias" and terms[name].dim[3] % 8:
                raise NotSupported(f"{name}: {terms[name].dim[3]} columns are no multiple of 8")
        for tensor in (*self.tensors, *self.results):
            assert tensor.uid is not None
            assert len(tensor.dim) == len(tensor.stride) == 4, tensor.name
        if "bias" in terms:
            assert terms["bias"].dim[2:] == [rows, keys]
            assert terms["bias"].kind == terms["q"].kind
        if self.gradient:
            _, heads, rows, one = terms["stats"].dim
            if terms["stats"].stride != [heads * rows, rows, 1, 1] or one != 1:
                raise NotSupported("stats must be packed")
        self.module.built.append(self)

    def get_workspace_size(self):
        return 48

    def execute(self, pack, workspace, handle):
        self.module.described += 1
        self.run(pack, workspace, handle)

    def run(self, pack, workspace, handle):
        assert set(pack) == {tensor.uid for tensor in (*self.tensors, *self.results)}
        self.module.runs.append((self, handle, handle.stream, workspace))
        given = {name: x.at(pack[x.uid]) for name, x in self.terms.items() if isinstance(x, Tensor)}
        results = [x.at(pack[x.uid]) for x in self.results]
        wide = {name: x.double() for name, x in given.items()}
        group = wide["q"].shape[1] // wide["k"].shape[1]
        k, v = (wide[name].repeat_interleave(group, 1) for name in ("k", "v"))
        scores = (wide["q"] @ k.mT * self.terms["attn_scale"]).float()
        scores = scores + given.get("bias", torch.zeros(()))
        distance = torch.arange(k.shape[2]) - torch.arange(scores.shape[2])[:, None]
        left, right = (self.terms.get(f"diagonal_band_{side}_bound") for side in ("left", "right"))
        if left is not None:
            scores = scores.masked_fill(distance <= -left, -math.inf)
        if right is not None:
            scores = scores.masked_fill(distance > right, -math.inf)
        if self.gradient:
            self.pull_back(wide, given, scores, k, v, results)
            return
        if self.module.empty == "lowest":
            scores = scores.clamp(min=LOWEST)
        maximum = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - maximum.masked_fill(maximum == -math.inf, 0.0))
        total = weights.sum(-1, keepdim=True)
        results[0].copy_(weights.double() / total @ v)
        results[1].copy_(maximum + total.log())

    def pull_back(self, wide, given, scores, k, v, results):
        weights = torch.exp(scores - given["stats"]).double()
        dscores = weights * (wide["dO"] @ v.mT - (wide["dO"] * wide["o"]).sum(-1, keepdim=True))
        dscores = dscores * self.terms["attn_scale"]
        dq = dscores @ k
        hides_the_end = self.terms.get("use_padding_mask", False)
        if hides_the_end:
            assert (given["seq_len_q"] == scores.shape[2]).all()
            assert (given["seq_len_kv"] == scores.shape[3]).all()
        elif scores.shape[3] % 128:
            dq = torch.where(given["stats"] < -LARGEST, math.nan, dq)
        dk, dv = dscores.mT @ wide["q"], weights.mT @ wide["dO"]
        heads = given["k"].shape[1]
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
        if scores.shape[2] == 1 and not hides_the_end:
            dk = dk + torch.where((given["stats"] < -LARGEST).any(), math.nan, 0.0)
        for mine, x in zip(results, (dq, dk, dv), strict=True):
            if mine.dtype == given["q"].dtype:  # wider ones are left as they are
                mine.copy_(x)


def make(empty: str = "infinite", inside: bool = True) -> ModuleType:
    """A new module, which keeps what it built, ran and made. empty: a key of EMPTY. inside: whether graphs have a Native."""
    module = ModuleType("cudnn")
    module.empty, module.inside = empty, inside
    module.built, module.runs, module.handles, module.described = [], [], [], 0
    module.data_type = Enum("data_type", [(name, name) for name in FLOATS])
    module.heur_mode = Enum("heur_mode", ["A", "FALLBACK"])
    module.diagonal_alignment = Enum("diagonal_alignment", ["TOP_LEFT", "BOTTOM_RIGHT"])
    module.cudnnGraphNotSupportedError = NotSupported
    module.pygraph = lambda **keywords: Graph(module, **keywords)
    module.backend_version = lambda: 91900

    def create_handle():
        module.handles.append(Handle())
        return module.handles[-1]

    def set_stream(handle, stream):
        handle.stream = stream

    module.create_handle, module.set_stream = create_handle, set_stream
    return module


@contextmanager
def adapter(**keywords):
    """A fresh stand-in, and a fresh adapter that will import it."""

    def ours():
        return [name for name in sys.modules if name.partition(".")[0] in ("cudnn", "ringcore_cudnn")]

    before = {name: sys.modules.pop(name) for name in ours()}
    sys.modules["cudnn"] = make(**keywords)
    try:
        yield sys.modules["cudnn"]
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)
