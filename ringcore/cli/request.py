"""What a call of ``ringcore attend`` asks for, read from the files' headers and checked before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ringcore.arguments import Arguments, check_arguments, check_columns
from ringcore.cli.backends import Backend, find_backend
from ringcore.cli.check import Question
from ringcore.cli.options import AttendOptions, parse_dilated, parse_integers, parse_offset, parse_window
from ringcore.cli.output import Target, check_targets, plan_targets
from ringcore.cli.tensors import Stored, dtype_of, open_tensor
from ringcore.cli.visible import pairs_of_rows, pairs_of_tiles
from ringcore.discovery import choose_kernels
from ringcore.errors import DtypeError, KeywordError
from ringcore.inputs import Inputs
from ringcore.layout import Layout, resolve_layout
from ringcore.partial import FLOATING
from ringcore.protocols import Kernels
from ringcore.session import visibility_of
from ringcore.tiling import tiles_between
from ringcore.values import Array


@dataclass(frozen=True)
class Request:
    """A checked call: the tensors in their files, the keywords in full, and who computes.

    runs: the rows of q and of k that this rank holds, as global positions. keywords: those of `ring_attention`, or of
    `dilated_attention` if that is asked for.
    """

    question: Question
    arguments: Arguments
    keywords: dict[str, Any]
    layout: str
    q_layout: Layout
    k_layout: Layout
    q_runs: tuple[range, ...]
    k_runs: tuple[range, ...]
    backend: Backend
    kernels: Kernels
    targets: list[Target]

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of q, k, v and out."""
        return dtype_of(self.question.dtype)

    @property
    def wide(self) -> np.dtype[Any]:
        """That of lse."""
        return np.dtype("float64" if self.question.dtype == "float64" else "float32")

    def pairs(self, runs: Sequence[range]) -> int:
        """How many pairs of the queries at these positions and a key are visible, over the batch and the heads."""
        asked = self.arguments
        if asked.dilation is not None:
            length = asked.k.shape[2]
            return pairs_of_tiles(tiles_between(runs, (range(length),), visibility_of(asked, length, length)))
        pairs = pairs_of_rows(
            runs, asked.k.shape[2], causal=asked.causal, window=asked.window, offsets=asked.offsets,
            key_lengths=asked.key_lengths,
        )  # fmt: skip
        return pairs * int(asked.q.shape[1])

    def in_file_order(self, x: Array) -> Array:
        """[B, H, S, D] with the file's order of axes, as a view."""
        return x if self.question.axis == 2 else x.swapaxes(1, 2)


def read_request(options: AttendOptions, rank: int, size: int, sharers: int, place: int) -> Request:
    """The request of rank ``rank`` out of ``size``.

    sharers: how many ranks share this machine's cores. place: which of those on its node this one is.
    Raises the error of whatever is wrong with the options, the headers of the files, or the two together.
    """
    if options.ring_size is not None and size > 1:
        raise KeywordError(
            f"--ring-size {options.ring_size} emulates a ring in one process, but {size} processes were started. "
            "Leave it out, or run without mpiexec."
        )
    if options.dtype is not None and options.dtype not in FLOATING:
        raise KeywordError(f"--dtype is {options.dtype!r}; it must be one of {', '.join(FLOATING)}.")
    backend = find_backend(options.backend, place)
    q, k, v, bias, mask = _open(options)
    for stored in (q, k, v):
        if stored.dtype.name not in FLOATING:
            raise DtypeError(
                f"{stored.name} holds {stored.dtype}; it must be one of {', '.join(FLOATING)}. Convert it first."
            )
    dtype = options.dtype or q.dtype.name
    given = options.dtype
    arguments = check_arguments(
        Inputs(
            _like(q, given), _like(k, given), _like(v, given), None if bias is None else _like(bias),
            None if mask is None else _like(mask),
        ),
        causal=options.causal, window=parse_window(options.window), scale=options.scale, softcap=options.softcap,
        query_offset=parse_offset(options.query_offset),
        key_lengths=None if options.key_lengths is None else parse_integers("--key-lengths", options.key_lengths),
        layout=options.layout or "contiguous", axes=options.axes,
        dilation=None if options.dilated is None else (*parse_dilated(options.dilated), options.head_offset),
    )  # fmt: skip
    check_columns(arguments, arguments.q.shape[2], arguments.k.shape[2])
    ranks = options.ring_size or size
    layout = options.layout or ("zigzag" if options.causal and ranks > 1 else "contiguous")
    lengths = arguments.q.shape[2], arguments.k.shape[2]
    q_layout, k_layout = (resolve_layout(layout, length, size) for length in lengths)
    return Request(
        question=Question(
            q, k, v, bias, mask, dtype, 2 if options.axes == "bhsd" else 1, arguments.causal, arguments.window,
            arguments.score.scale, arguments.score.softcap, arguments.offsets, arguments.key_lengths,
            arguments.dilation,
        ),
        arguments=arguments,
        keywords={
            "causal": arguments.causal, "scale": arguments.score.scale, "softcap": arguments.score.softcap,
            "key_lengths": arguments.key_lengths, "layout": layout, "ring_size": options.ring_size,
            **_what_is_seen(arguments),
        },
        layout=layout,
        q_layout=q_layout,
        k_layout=k_layout,
        q_runs=q_layout.shards[rank],
        k_runs=k_layout.shards[rank],
        backend=backend,
        kernels=_kernels(options, backend, arguments, dtype, sharers),
        targets=_targets(options, arguments, dtype, rank),
    )  # fmt: skip


def _open(options: AttendOptions) -> tuple[Stored, Stored, Stored, Stored | None, Stored | None]:
    def tensor(own: Path | None, name: str) -> Stored:
        path = own or options.input
        if path is None:
            raise KeywordError(f"--{name} is missing.")
        return open_tensor(path, name)

    q, k, v = tensor(options.q, options.q_name), tensor(options.k, options.k_name), tensor(options.v, options.v_name)
    bias, mask = (
        None if path is None else open_tensor(path, name)
        for path, name in ((options.bias, "bias"), (options.mask, "mask"))
    )
    return q, k, v, bias, mask


def _what_is_seen(arguments: Arguments) -> dict[str, Any]:
    """The keywords of `dilated_attention`, or else of `ring_attention`, that the other does not have."""
    if arguments.dilation is None:
        return {"window": arguments.window, "query_offset": arguments.offsets}
    lengths, rates = zip(*arguments.dilation.branches, strict=True)
    return {"segment_lengths": lengths, "dilation_rates": rates, "head_offset": arguments.dilation.head_offset}


def _like(stored: Stored, dtype: str | None = None) -> Array:
    """An array of this shape and dtype that takes no memory, for the checks that `ring_attention` makes."""
    return np.broadcast_to(np.zeros((), dtype=dtype_of(dtype or stored.dtype.name)), stored.shape)


def _kernels(options: AttendOptions, backend: Backend, arguments: Arguments, dtype: str, sharers: int) -> Kernels:
    q, v = (
        backend.enter(np.zeros((1, 1, 1, width), dtype=dtype_of(dtype)))
        for width in (arguments.q.shape[3], arguments.v.shape[3])
    )
    return choose_kernels(options.kernels or backend.kernels, q, v, arguments.needs, sharers)[0]


def _targets(options: AttendOptions, arguments: Arguments, dtype: str, rank: int) -> list[Target]:
    batch, heads, rows, _ = arguments.q.shape
    width = arguments.v.shape[3]
    out = (batch, heads, rows, width) if options.axes == "bhsd" else (batch, rows, heads, width)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {"out": (out, dtype_of(dtype))}
    if options.wants_lse:
        shapes["lse"] = ((batch, heads, rows), np.dtype("float64" if dtype == "float64" else "float32"))
    targets = plan_targets(shapes, options.out, options.lse_out)
    if rank == 0:  # the others do not look: a slower one would find what rank 0 has made meanwhile
        inputs = [options.input, options.q, options.k, options.v, options.bias, options.mask]
        check_targets(targets, [path for path in inputs if path is not None], options.force)
    return targets
