"""Attention over one tile as a cuDNN graph, described by plain data."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cudnn

from ringcore import Band, UnsupportedError

Operand = tuple[str, tuple[int, ...], tuple[int, ...], Any]
"""Name, shape, strides (in elements) and dtype, or its name, of an array that a graph reads or writes."""

Launch = Callable[[tuple[int, ...], int, Any], None]
"""Runs a graph on the addresses of its operands and of its workspace, on a handle's stream."""

UIDS = {
    name: number
    for number, name in enumerate(
        ("q", "k", "v", "mask", "q_lengths", "k_lengths", "out", "lse", "dout", "dq", "dk", "dv"), 1
    )
}
"""The number by which cuDNN knows each operand."""

_TYPES = {"float16": "HALF", "bfloat16": "BFLOAT16", "float32": "FLOAT", "int32": "INT32"}


class Problem(NamedTuple):
    """What a graph computes; equal problems share one.

    operands: all arrays, in the order in which their addresses will come. Forward has q [B, H, S, D], k [B, Hk, T, D],
        v [B, Hk, T, E], gives out [B, H, S, E] and lse [B, H, S], natural log. With dout it is backward: out and lse
        are given, dq, dk and dv come. Optional: mask [B or 1, H or 1, S, T], which is added to the scores and holds 0
        or -inf, and q_lengths with k_lengths [B].
    scale: what q.k is multiplied by. band: as in `ringcore.Band`, with lo <= 0 <= hi. deterministic: whether
        gradients are equal from run to run.
    """

    operands: tuple[Operand, ...]
    scale: float
    band: Band = Band()
    deterministic: bool = False


class Graph:
    """A graph that is ready to run.

    workspace: how many bytes of memory it needs besides its operands.
    """

    def __init__(self, problem: Problem, handle: Any) -> None:
        operands = {name: _Array.of(*rest) for name, *rest in problem.operands}
        self._graph = cudnn.pygraph(
            io_data_type=operands["q"].dtype, intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT, handle=handle,
        )  # fmt: skip
        uids = tuple(UIDS[name] for name in operands)
        try:
            (_backward if "dout" in operands else _forward)(self._graph, problem, operands)
            self._graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except (cudnn.cudnnGraphNotSupportedError, ValueError) as exc:
            raise UnsupportedError(
                f"cuDNN {cudnn.backend_version()} has no kernel for {_told(problem)}: {exc}"
            ) from exc
        self.workspace: int = self._graph.get_workspace_size()
        self._launch = _straight(self._graph, uids) or _described(self._graph, uids)

    def __call__(self, addresses: tuple[int, ...], workspace: int, handle: Any) -> None:
        """Run on the handle's stream. addresses: of the problem's operands, in their order."""
        self._launch(addresses, workspace, handle)


class _Array(NamedTuple):
    """An operand as cuDNN knows it, with four axes."""

    shape: list[int]
    strides: list[int]
    dtype: Any

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> _Array:
        ones = [1] * (4 - len(shape))
        kind = getattr(cudnn.data_type, _TYPES[_name(dtype)])
        return cls([*shape, *ones], [*strides, *ones], kind)


def _described(graph: Any, uids: tuple[int, ...]) -> Launch:
    """The graph's own ``execute``."""

    def launch(addresses: tuple[int, ...], workspace: int, handle: Any) -> None:
        graph.execute(dict(zip(uids, addresses, strict=True)), workspace, handle=handle)

    return launch


def _straight(graph: Any, uids: tuple[int, ...]) -> Launch | None:
    """What ``execute`` comes to in the end, or None if this release of the frontend has it elsewhere.

    ``execute`` first describes every address in Python, which takes the host longer than to launch the kernels.
    """
    try:
        if graph.selected_engine is not None:  # a kernel of the frontend's own, which cuDNN does not know
            return None
        plan = graph.plans[graph._plan_index].cpp_index if graph.plans else None
        native = graph._lowered_graph
        run = native._execute_with_raw_ptrs
        native._prepare_variant_pack_template()
        order = list(native._get_variant_pack_uids_sorted())
    except (AttributeError, IndexError):
        return None
    if order != sorted(uids):
        return None
    places = [uids.index(uid) for uid in order]
    room = ctypes.c_void_p * len(places)

    def launch(addresses: tuple[int, ...], workspace: int, handle: Any) -> None:
        pointers = room(*[addresses[place] for place in places])
        run(ctypes.addressof(pointers), len(places), workspace, handle.backend_handle, -1 if plan is None else plan)

    return launch


def bounds(band: Band) -> dict[str, Any]:
    """The band as cuDNN's diagonal from the upper left corner, whose left bound does not include itself.

    Raises UnsupportedError for a band that leaves rows or columns of the tile's corner without any pair: cuDNN takes
    no negative bound.
    """
    if (band.lo or 0) > 0 or (band.hi or 0) < 0:
        raise UnsupportedError(f"cuDNN's bands hold the diagonal, but this tile's is {band}.")
    found: dict[str, Any] = {}
    if band.lo is not None:
        found["diagonal_band_left_bound"] = 1 - band.lo
    if band.hi is not None:
        found["diagonal_band_right_bound"] = band.hi
    if found:
        found["diagonal_alignment"] = cudnn.diagonal_alignment.TOP_LEFT
    return found


def _forward(graph: Any, problem: Problem, operands: dict[str, _Array]) -> None:
    given = _given(graph, operands, ("out", "lse"))
    out, lse = graph.sdpa(
        q=given["q"], k=given["k"], v=given["v"], attn_scale=problem.scale, generate_stats=True, name="forward",
        **bounds(problem.band), **_terms(given),
    )  # fmt: skip
    _mark(operands, {"out": out, "lse": lse})


def _backward(graph: Any, problem: Problem, operands: dict[str, _Array]) -> None:
    given = _given(graph, operands, ("dq", "dk", "dv"))
    dq, dk, dv = graph.sdpa_backward(
        q=given["q"], k=given["k"], v=given["v"], o=given["out"], dO=given["dout"], stats=given["lse"],
        attn_scale=problem.scale, use_deterministic_algorithm=problem.deterministic, name="backward",
        **bounds(problem.band), **_terms(given),
    )  # fmt: skip
    _mark(operands, {"dq": dq, "dk": dk, "dv": dv})


def _given(graph: Any, operands: dict[str, _Array], results: tuple[str, ...]) -> dict[str, Any]:
    """The graph's tensors for what it is given; its results come from its operations."""
    return {
        name: graph.tensor(dim=x.shape, stride=x.strides, data_type=x.dtype, uid=UIDS[name], name=name)
        for name, x in operands.items()
        if name not in results
    }


def _terms(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {"bias": given["mask"]} if "mask" in given else {}
    if "k_lengths" in given:
        found |= {"use_padding_mask": True, "seq_len_q": given["q_lengths"], "seq_len_kv": given["k_lengths"]}
    return found


def _mark(operands: dict[str, _Array], results: Mapping[str, Any]) -> None:
    for name, result in results.items():
        x = operands[name]
        result.set_output(True).set_uid(UIDS[name]).set_dim(x.shape).set_stride(x.strides).set_data_type(x.dtype)


def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def _told(problem: Problem) -> str:
    arrays = ", ".join(f"{name} {list(shape)} {_name(dtype)}" for name, shape, _, dtype in problem.operands)
    return f"{'gradients' if 'dout' in arrays else 'attention'} of {arrays} with {problem.band}"
