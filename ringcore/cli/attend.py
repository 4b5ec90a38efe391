"""``ringcore attend``: attention from file to file, in one process or as one rank of many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ringcore.api import ring_attention
from ringcore.cli.backends import DeviceBackend
from ringcore.cli.check import check_rows, chosen_rows, verdict
from ringcore.cli.failures import Failure, all_do, together
from ringcore.cli.launcher import join_ring
from ringcore.cli.options import AttendOptions, check_options, parse_size
from ringcore.cli.output import Output
from ringcore.cli.progress import ReportingKernels, progress_bar
from ringcore.cli.request import Request, read_request
from ringcore.cli.streaming import Streaming, rows_that_fit
from ringcore.cli.summary import Share, lines_of, share_note, summary_of
from ringcore.cli.tensors import Stored, read_rows
from ringcore.dilated import dilated_attention
from ringcore.discovery import find_transport
from ringcore.errors import KeywordError
from ringcore.protocols import Transport
from ringcore.values import Array, Spec


def attend(options: AttendOptions) -> int:
    """Run the call; 0, or the error of what went wrong, with nothing left under the output's name."""
    check_options(options)
    transport = join_ring()
    try:
        _attend(options, transport)
    except BaseException as error:
        if transport is not None and not isinstance(error, Failure):
            transport.abort(error)
        raise
    return 0


def _attend(options: AttendOptions, transport: Transport | None) -> None:
    rank, size, sharers = (0, 1, 1) if transport is None else (transport.rank, transport.size, transport.sharers)
    place = _place(transport)

    def understand() -> tuple[Request, None]:
        return read_request(options, rank, size, sharers, place), None

    request, _ = together(transport, understand)
    output = Output(request.targets, options.force)
    share = Share(rank, transport)
    try:
        _, (temporary, *_) = together(transport, lambda: (None, output.make() if rank == 0 else []))
        all_do(transport, partial(output.open, temporary))
        out, lse = _compute(request, options, transport, share)
        with share.timed("writing"):
            all_do(transport, partial(_write, request, output, out, lse))
            all_do(transport, output.settle)
        del out, lse
        found = _checked(request, output, options, transport, rank, share) if options.check else None
        passed = found is None or bool(found["passed"])
        if passed:
            all_do(transport, output.name)
    finally:
        output.discard()
    _, notes = together(transport, lambda: (None, share_note(share)))
    if rank == 0 and not options.quiet:
        summary = summary_of(request, options, notes, found)
        sys.stdout.write(lines_of(summary, options.json))
        sys.stdout.flush()
    if found is not None and not passed:
        raise Failure(f"the check failed: {', '.join(_failures(found))}. {options.out} was not written.", 1)


def _compute(
    request: Request, options: AttendOptions, transport: Transport | None, share: Share
) -> tuple[Array, Array | None]:
    """This rank's out and lse [B, H, S, ...] as NumPy arrays."""
    share.pairs = request.pairs(request.q_runs)
    some = _rows_at_once(request, options, transport)
    if some is not None:
        share.words = f"files: q passes through in pieces of {some[0]} rows, and for each of them k and v of {some[1]}"
        with progress_bar(share.pairs, _shown(options, share)) as report, share.timed("computing"):
            return _streamed(Streaming(request, *some, partial(_terms, request), report), options, transport, share)
    window = _window(request, transport)

    def read() -> tuple[list[Array], None]:
        question, (k_shape, v_shape) = request.question, _shapes(request, request.k_layout.lengths[share.rank])
        q_shape = (*request.arguments.q.shape[:2], request.q_layout.lengths[share.rank], request.arguments.q.shape[3])
        k, v = window or (np.empty(shape, dtype=request.dtype) for shape in (k_shape, v_shape))
        q = np.empty(q_shape, dtype=request.dtype)
        for stored, runs, x in (
            (question.q, request.q_runs, q), (question.k, request.k_runs, k), (question.v, request.k_runs, v),
        ):  # fmt: skip
            read_rows(stored, question.axis, runs, request.in_file_order(x))
        return [q, k, v], None

    with share.timed("reading"):
        (q, k, v), _ = together(transport, read)
        terms, _ = together(transport, lambda: (_terms(request, request.q_runs), None))
    share.shard = sum(x.nbytes for x in (q, k, v)) + q.shape[2] * q.shape[1] * q.shape[0] * (
        v.shape[3] * request.dtype.itemsize + request.wide.itemsize * options.wants_lse
    )
    enter = request.backend.enter
    if transport is not None:  # what carries this library's arrays tells more than what carries notes
        share.transport = find_transport(transport, like=enter(q[:, :, :0]))
    # A GPU is given all its work at once: a bar would say nothing of what is done.
    on_device = isinstance(request.backend, DeviceBackend)
    with (
        progress_bar(share.pairs, _shown(options, share) and not on_device) as report,
        share.timed("computing"),
    ):
        kernels = request.kernels if report is None else ReportingKernels(request.kernels, report)
        attention = ring_attention if request.arguments.dilation is None else dilated_attention
        result = attention(
            enter(q), enter(k), enter(v), ring=transport, kernels=kernels, return_lse=options.wants_lse,
            **{name: enter(term) for name, term in terms.items()}, **request.keywords,
        )  # fmt: skip
    out, lse = result if options.wants_lse else (result, None)
    return request.backend.leave(out), None if lse is None else request.backend.leave(lse)


def _place(transport: Transport | None) -> int:
    """Which of the ranks of its node this one is. Collective."""
    if transport is None:
        return 0
    nodes = transport.gather(str(transport.node).encode())
    return nodes[: transport.rank].count(nodes[transport.rank])


def _streamed(
    streaming: Streaming, options: AttendOptions, transport: Transport | None, share: Share
) -> tuple[Array, Array | None]:
    """out and lse, made a piece at a time; the ranks meet after each, as they wait for none for ever."""
    (out, lse), counts = together(transport, lambda: (streaming.results(), streaming.count))
    share.shard = out.nbytes + lse.nbytes
    pieces = streaming.pieces(out, lse)
    for _ in range(max(counts)):
        all_do(transport, lambda: next(pieces, None))
    return out, lse if options.wants_lse else None


def _rows_at_once(request: Request, options: AttendOptions, transport: Transport | None) -> tuple[int, int] | None:
    """How many rows of q and of k a GPU takes at a time, or None if every rank's shard fits whole. Collective."""
    backend = request.backend
    if not isinstance(backend, DeviceBackend):  # which is so on every rank, or on none
        return None
    gpu, gpus = together(transport, lambda: (backend.gpu(), backend.gpu()))

    def find() -> tuple[tuple[int, int] | None, bool]:
        free = backend.room() // gpus.count(gpu)
        room = free if options.device_memory is None else parse_size(options.device_memory)
        rows = rows_that_fit(request, room)
        if rows is not None and options.ring_size is not None:
            raise KeywordError(
                f"--ring-size {options.ring_size} emulates a ring of whole arrays, which do not fit into {room} bytes "
                "of the GPU's memory. Leave it out: they then pass through in pieces."
            )
        return rows, rows is not None

    rows, pieces = together(transport, find)
    if not any(pieces):
        return None
    return rows or (max(1, *request.q_layout.lengths), max(1, *request.k_layout.lengths))


def _shown(options: AttendOptions, share: Share) -> bool:
    return share.rank == 0 and not options.quiet


def _window(request: Request, transport: Transport | None) -> Sequence[Array] | None:
    """This rank's k and v in memory that the others read, where the transport has any: spares a copy."""
    allocate = getattr(transport, "allocate", None)
    if transport is None or allocate is None or isinstance(request.backend, DeviceBackend):
        return None
    like = np.empty(0, dtype=request.dtype)
    specs = {
        rank: tuple(Spec(shape, like, like.dtype) for shape in _shapes(request, length))
        for rank, length in enumerate(request.k_layout.lengths)
    }
    blocks: Sequence[Array] | None = allocate(specs)
    return blocks


def _shapes(request: Request, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of k and v with so many rows."""
    k, v = request.arguments.k.shape, request.arguments.v.shape
    return (*k[:2], rows, k[3]), (*v[:2], rows, v[3])


def _terms(request: Request, runs: Sequence[range]) -> dict[str, Array]:
    """The rows of bias and mask at these positions."""
    rows = sum(map(len, runs))
    terms = {}
    for name, stored in (("bias", request.question.bias), ("mask", request.question.mask)):
        if stored is not None:
            terms[name] = _term(stored, runs, rows)
    return terms


def _term(stored: Stored, runs: Sequence[range], rows: int) -> Array:
    axis = len(stored.shape) - 2
    if stored.shape[axis] == 1:
        runs, rows = (range(1),), 1
    term = np.empty((*stored.shape[:axis], rows, stored.shape[-1]), dtype=stored.dtype)
    read_rows(stored, axis, runs, term)
    return term


def _write(request: Request, output: Output, out: Array, lse: Array | None) -> None:
    output.write("out", request.question.axis, request.q_runs, request.in_file_order(out))
    if lse is not None:
        output.write("lse", 2, request.q_runs, lse)


def _checked(
    request: Request, output: Output, options: AttendOptions, transport: Transport | None, rank: int, share: Share
) -> dict[str, Any]:
    """Every rank's random rows, checked as they were written."""
    length = request.arguments.q.shape[2]
    own = [row for row in chosen_rows(length, options.check, options.seed) if any(row in run for run in request.q_runs)]

    def check() -> tuple[None, dict[str, Any]]:
        lse = output.written("lse") if options.wants_lse else None
        return None, check_rows(request.question, own, output.written("out"), lse)

    with share.timed("checking"):
        _, notes = together(transport, check)
    return verdict(notes, request.question.dtype, options.wants_lse)


def _failures(found: dict[str, Any]) -> list[str]:
    return [
        f"{name} is off by {found[f'{name}_error']:.3g}, and {found[f'{name}_tolerance']:.3g} is allowed"
        for name in ("out", "lse")
        if f"{name}_error" in found and not found[f"{name}_error"] <= found[f"{name}_tolerance"]
    ]
