"""Attention over one tile as a cuDNN graph, described by plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import cudnn

from ringcore import Band, UnsupportedError

Operand = tuple[str, tuple[int, ...], tuple[int, ...], str]
"""Name, shape, strides (in elements) and dtype of an array that a graph reads or writes."""

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

    operands: all arrays, of four axes, in the order in which their addresses will come. Forward has q [B, H, S, D],
        k [B, Hk, T, D], v [B, Hk, T, E], gives out [B, H, S, E] and lse [B, H, S, 1], natural log. With dout it is
        backward: out and lse are given, dq, dk and dv come. Optional: mask [B or 1, H or 1, S, T], which is added to
        the scores and holds 0 or -inf, and q_lengths with k_lengths [B, 1, 1, 1].
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
        kinds = {name: dtype for name, _, _, dtype in problem.operands}
        self._graph = cudnn.pygraph(
            io_data_type=_type(kinds["q"]), intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT, handle=handle,
        )  # fmt: skip
        self._uids = tuple(UIDS[name] for name in kinds)
        try:
            (_backward if "dout" in kinds else _forward)(self._graph, problem)
            self._graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except (cudnn.cudnnGraphNotSupportedError, ValueError) as exc:
            raise UnsupportedError(
                f"cuDNN {cudnn.backend_version()} has no kernel for {_told(problem)}: {exc}"
            ) from exc
        self.workspace: int = self._graph.get_workspace_size()

    def __call__(self, addresses: tuple[int, ...], workspace: int, handle: Any) -> None:
        """Run on the handle's stream. addresses: of the problem's operands, in their order."""
        self._graph.execute(dict(zip(self._uids, addresses, strict=True)), workspace, handle=handle)


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


def _forward(graph: Any, problem: Problem) -> None:
    given = _operands(graph, problem)
    out, lse = graph.sdpa(
        q=given["q"], k=given["k"], v=given["v"], attn_scale=problem.scale, generate_stats=True, name="forward",
        **bounds(problem.band), **_terms(given),
    )  # fmt: skip
    _mark(problem, {"out": out, "lse": lse})


def _backward(graph: Any, problem: Problem) -> None:
    given = _operands(graph, problem)
    dq, dk, dv = graph.sdpa_backward(
        q=given["q"], k=given["k"], v=given["v"], o=given["out"], dO=given["dout"], stats=given["lse"],
        attn_scale=problem.scale, use_deterministic_algorithm=problem.deterministic, name="backward",
        **bounds(problem.band), **_terms(given),
    )  # fmt: skip
    _mark(problem, {"dq": dq, "dk": dk, "dv": dv})


def _operands(graph: Any, problem: Problem) -> dict[str, Any]:
    """The graph's tensors for what it is given; its results come from its operations."""
    gradient = any(name == "dout" for name, *_ in problem.operands)
    results = ("dq", "dk", "dv") if gradient else ("out", "lse")
    return {
        name: graph.tensor(dim=list(shape), stride=list(strides), data_type=_type(dtype), uid=UIDS[name], name=name)
        for name, shape, strides, dtype in problem.operands
        if name not in results
    }


def _terms(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {"bias": given["mask"]} if "mask" in given else {}
    if "k_lengths" in given:
        found |= {"use_padding_mask": True, "seq_len_q": given["q_lengths"], "seq_len_kv": given["k_lengths"]}
    return found


def _mark(problem: Problem, results: Mapping[str, Any]) -> None:
    for name, shape, strides, dtype in problem.operands:
        if name in results:
            result = results[name].set_output(True).set_uid(UIDS[name])
            result.set_dim(list(shape)).set_stride(list(strides)).set_data_type(_type(dtype))


def _type(dtype: str) -> Any:
    return getattr(cudnn.data_type, _TYPES[dtype])


def _told(problem: Problem) -> str:
    arrays = ", ".join(f"{name} {list(shape)} {dtype}" for name, shape, _, dtype in problem.operands)
    return f"{'gradients' if 'dout' in arrays else 'attention'} of {arrays} with {problem.band}"
