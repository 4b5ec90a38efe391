"""The options of ``ringcore attend`` as plain data, and how their texts are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ringcore.errors import KeywordError

Window = tuple[int | None, int | None] | int | None


@dataclass(frozen=True)
class AttendOptions:
    """One call of ``ringcore attend``, as it was typed. See its help for what each option means."""

    input: Path | None
    out: Path
    q: Path | None = None
    k: Path | None = None
    v: Path | None = None
    q_name: str = "q"
    k_name: str = "k"
    v_name: str = "v"
    lse: bool = False
    lse_out: Path | None = None
    dtype: str | None = None
    backend: str = "numpy"
    causal: bool = False
    window: str | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: Path | None = None
    mask: Path | None = None
    dilated: str | None = None
    head_offset: str = "modulo"
    query_offset: str = "0"
    key_lengths: str | None = None
    layout: str | None = None
    axes: str = "bhsd"
    kernels: str | None = None
    ring_size: int | None = None
    device_memory: str | None = None
    check: int = 0
    seed: int = 0
    force: bool = False
    quiet: bool = False
    json: bool = False

    @property
    def wants_lse(self) -> bool:
        """Whether the lse is written."""
        return self.lse or self.lse_out is not None


def parse_window(text: str | None) -> Window:
    """ "3,none" as (3, None), "4" as 4, "none" as None."""
    if text is None or text.strip().lower() == "none":
        return None
    sides = [None if part.strip().lower() == "none" else _integer("--window", part, text) for part in text.split(",")]
    if len(sides) == 1:
        return sides[0]
    if len(sides) != 2:
        raise KeywordError(
            f'--window is {text!r}; it must be LEFT,RIGHT, each a number or "none", or one number with --causal.'
        )
    return sides[0], sides[1]


def parse_dilated(text: str) -> tuple[list[int], list[int]]:
    """ "2048:1,4096:2" as [2048, 4096], [1, 2]."""
    pairs = [part.split(":") for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise KeywordError(f"--dilated is {text!r}; it must be LENGTH:RATE for each branch, such as 2048:1,4096:2.")
    lengths, rates = zip(*((_integer("--dilated", part, text) for part in pair) for pair in pairs), strict=True)
    if min(*lengths, *rates) < 1:
        raise KeywordError(f"--dilated is {text!r}; lengths and rates must be 1 or more.")
    return list(lengths), list(rates)


def parse_integers(option: str, text: str) -> list[int]:
    """ "3,5" as [3, 5]."""
    return [_integer(option, part, text) for part in text.split(",")]


def parse_offset(text: str) -> int | list[int]:
    """ "3" as 3, "3,5" as [3, 5]."""
    numbers = parse_integers("--query-offset", text)
    return numbers[0] if len(numbers) == 1 else numbers


def parse_size(text: str) -> int:
    """ "3GiB" as 3 * 2**30; also MiB, KiB, GB, MB, KB, B, or nothing for bytes."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise KeywordError(f"--device-memory is {text!r}; it must be a size such as 40GiB, 500MB or 1000000.")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def check_options(options: AttendOptions) -> None:
    """Raise KeywordError for options that contradict each other or miss their partner."""
    singles = {"--q": options.q, "--k": options.k, "--v": options.v}
    missing = [name for name, path in singles.items() if path is None]
    if options.input is not None and len(missing) < 3:
        raise KeywordError("a file and --q, --k, --v came together. Give one .safetensors file, or three .npy files.")
    if options.input is None and missing:
        raise KeywordError(f"{', '.join(missing)} is missing. Give one .safetensors file, or --q, --k and --v.")
    if options.input is not None and options.input.suffix == ".npy":
        raise KeywordError(f"{options.input} holds one array. Give q, k and v as --q, --k and --v.")
    if options.out.suffix not in (".safetensors", ".npy"):
        raise KeywordError(
            f"--out is {str(options.out)!r}; its name must end in .safetensors or .npy, which says the format."
        )
    if options.lse_out is not None and options.out.suffix == ".safetensors":
        raise KeywordError(
            "--lse-out is for .npy output. With .safetensors output, --lse writes lse into the same file."
        )
    if options.lse_out is not None and options.lse_out.suffix != ".npy":
        raise KeywordError(f"--lse-out is {str(options.lse_out)!r}; its name must end in .npy.")
    for name, path in (("--bias", options.bias), ("--mask", options.mask)):
        if path is not None and path.suffix != ".npy":
            raise KeywordError(f"{name} is {str(path)!r}; it must be a .npy file.")
    if options.dilated is not None:
        others = {
            "--window": options.window, "--bias": options.bias, "--mask": options.mask,
            "--query-offset": None if options.query_offset == "0" else options.query_offset,
        }  # fmt: skip
        for name, value in others.items():
            if value is not None:
                raise KeywordError(f"--dilated and {name} came together, but its branches say what is seen. Give one.")
    elif options.head_offset != "modulo":
        raise KeywordError(f"--head-offset {options.head_offset} is about the branches of --dilated, which is missing.")
    if options.check < 0:
        raise KeywordError(f"--check is {options.check}; it must be a number of rows, 0 or more.")
    if options.ring_size is not None and options.ring_size < 1:
        raise KeywordError(f"--ring-size is {options.ring_size}; it must be a number of ranks, 1 or more.")
    if options.device_memory is not None:
        if options.backend != "cupy":
            raise KeywordError(
                f"--device-memory bounds what --backend cupy takes of a GPU, but the backend is {options.backend}."
            )
        parse_size(options.device_memory)
    if options.backend == "reference" and options.kernels not in (None, "reference"):
        raise KeywordError(
            f"--backend reference and --kernels {options.kernels} contradict each other. Give one of them."
        )


def _integer(option: str, part: str, text: str) -> int:
    try:
        return int(part)
    except ValueError as exc:
        raise KeywordError(f"{option} is {text!r}; {part.strip()!r} is no whole number.") from exc
