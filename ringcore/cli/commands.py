"""The commands and their options."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from ringcore.cli.options import AttendOptions

app = typer.Typer(
    name="ringcore",
    help="Exact attention over sequences that are split across a ring of processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_INPUT, _MASKS, _RUN, _OUTPUT = "Input and output", "What a query sees", "How it is computed", "Checks and messages"


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"ringcore {version('ringcore')}")
        raise typer.Exit(0)


@app.callback()
def ringcore(
    show: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and stop.")
    ] = False,
) -> None:
    """Exact attention over sequences that are split across a ring of processes."""


@app.command()
def attend(
    out: Annotated[
        Path, typer.Option(help="The file to write: .safetensors (tensor out) or .npy.", rich_help_panel=_INPUT)
    ],
    input: Annotated[  # noqa: A002  # the word that the usage line shows
        Path | None, typer.Argument(help="A .safetensors file with tensors q, k and v.", show_default=False)
    ] = None,
    q: Annotated[
        Path | None, typer.Option("--q", help="q as .npy, instead of the file.", rich_help_panel=_INPUT)
    ] = None,
    k: Annotated[Path | None, typer.Option("--k", help="k as .npy.", rich_help_panel=_INPUT)] = None,
    v: Annotated[Path | None, typer.Option("--v", help="v as .npy.", rich_help_panel=_INPUT)] = None,
    q_name: Annotated[str, typer.Option(help="The tensor of the file that is q.", rich_help_panel=_INPUT)] = "q",
    k_name: Annotated[str, typer.Option(help="The tensor that is k.", rich_help_panel=_INPUT)] = "k",
    v_name: Annotated[str, typer.Option(help="The tensor that is v.", rich_help_panel=_INPUT)] = "v",
    axes: Annotated[
        str, typer.Option(help='Order in the files: "bhsd" (heads first) or "bshd".', rich_help_panel=_INPUT)
    ] = "bhsd",
    dtype: Annotated[
        str | None,
        typer.Option(help="Convert to float16, bfloat16, float32 or float64; out has it too.", rich_help_panel=_INPUT),
    ] = None,
    lse: Annotated[
        bool,
        typer.Option(
            "--lse", help="Also write lse [B, H, S]: into the .safetensors, or to OUT.lse.npy.", rich_help_panel=_INPUT
        ),
    ] = False,
    lse_out: Annotated[Path | None, typer.Option(help="Another .npy file for lse.", rich_help_panel=_INPUT)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace output that exists.", rich_help_panel=_INPUT)] = False,
    causal: Annotated[
        bool, typer.Option("--causal", help="Keys up to the query's own position.", rich_help_panel=_MASKS)
    ] = False,
    window: Annotated[
        str | None,
        typer.Option(
            help='LEFT,RIGHT: how far a query sees, each a number or "none"; with --causal one number W is W-1,0.',
            rich_help_panel=_MASKS,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="A .npy of bool, True = may attend; broadcasts to [B, H, S, N].", rich_help_panel=_MASKS),
    ] = None,
    bias: Annotated[
        Path | None,
        typer.Option(help="A .npy that is added to the scores; broadcasts likewise.", rich_help_panel=_MASKS),
    ] = None,
    dilated: Annotated[
        str | None,
        typer.Option(
            help="LENGTH:RATE,LENGTH:RATE,...: dilated attention with these branches, such as 2048:1,4096:2.",
            rich_help_panel=_MASKS,
        ),
    ] = None,
    head_offset: Annotated[
        str,
        typer.Option(
            help="With --dilated: modulo, or block, where neighbouring heads share an offset.", rich_help_panel=_MASKS
        ),
    ] = "modulo",
    query_offset: Annotated[
        str,
        typer.Option(help="The position of q's first row, or one for each batch entry: 3,5.", rich_help_panel=_MASKS),
    ] = "0",
    key_lengths: Annotated[
        str | None,
        typer.Option(help="How many keys exist, one number for each batch entry: 10,20.", rich_help_panel=_MASKS),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="What q.k is multiplied by; 1/sqrt(D) if not given.", rich_help_panel=_MASKS)
    ] = None,
    softcap: Annotated[
        float | None, typer.Option(help="Scores become CAP * tanh(score / CAP).", rich_help_panel=_MASKS)
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="contiguous, zigzag or striped; default zigzag for --causal with several ranks, else contiguous.",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = None,
    ring_size: Annotated[
        int | None, typer.Option(help="Emulate a ring of so many ranks in one process.", rich_help_panel=_RUN)
    ] = None,
    backend: Annotated[
        str, typer.Option(help="numpy, reference, torch (on the CPU) or cupy (on a GPU).", rich_help_panel=_RUN)
    ] = "numpy",
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="How much of a GPU's memory to take, such as 40GiB; nearly all that is free if not given. Shards that "
            "need more pass through in pieces.",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="Who computes, by name; the best if not given.", rich_help_panel=_RUN)
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            help="Recompute so many random rows densely in float64 before the output gets its name.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="The seed that chooses those rows.", rich_help_panel=_OUTPUT)] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar and no summary.", rich_help_panel=_OUTPUT)
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="The summary as one JSON object.", rich_help_panel=_OUTPUT)
    ] = False,
) -> int:
    """Attention of q, k and v from files, written to a file.

    Alone, or as every rank of `mpiexec -n P ringcore attend ...`: each rank then reads and writes only its own rows.

    Exit status: 0 done; 1 the check or the run failed; 2 wrong usage or input. Nothing is left of a failed run.
    """
    options = AttendOptions(
        input, out, q, k, v, q_name, k_name, v_name, lse, lse_out, dtype, backend, causal, window, scale, softcap,
        bias, mask, dilated, head_offset, query_offset, key_lengths, layout, axes, kernels, ring_size, device_memory,
        check, seed, force, quiet, json,
    )  # fmt: skip
    from ringcore.cli.attend import attend as run

    return run(options)


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="The function: package.module:function.", show_default=False)],
    signature: Annotated[
        str, typer.Option(help="How it is called: ringcore, sdpa, flash-attn, jax, seed, or a Python file that says.")
    ] = "ringcore",
    ranks: Annotated[str, typer.Option(help="The ring sizes to ask about.")] = "1,2,3,4",
    library: Annotated[
        str | None, typer.Option(help="numpy, torch, jax or cupy; the signature's if not given.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where arrays are: cpu or cuda; the library's if not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32, float16 or bfloat16.")] = "float32",
    only: Annotated[str | None, typer.Option(help="Keywords to ask about, such as causal,window.")] = None,
    launcher: Annotated[
        str, typer.Option(help="local: whole arrays and ring_size. mpiexec, torchrun: shards, a process for each rank.")
    ] = "local",
    layout: Annotated[str, typer.Option(help="Under a launcher, which rank holds which positions.")] = "contiguous",
    length: Annotated[int, typer.Option(help="Positions; 24 is even on rings up to 4.")] = 22,
    gradients: Annotated[bool, typer.Option(help="Ask for gradients too.")] = True,
    deadline: Annotated[float, typer.Option(help="Seconds for each answer.")] = 60.0,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with a picture to this file.")] = None,
) -> int:
    """Ask somebody's attention on rings of several sizes, and say which known mistake it makes.

    It runs in a process of its own. Status 0: right. 1: not.
    """
    from ringcore.cli.auditing import ring_sizes, run_audit
    from ringcore.testing.running import Spec

    names = tuple(only.split(",")) if only else ()
    sizes = ring_sizes(ranks)
    spec = Spec(target, signature, sizes, library, dtype, names, gradients, deadline, launcher, length, layout, device)
    return run_audit(spec, json, html)
