"""The entry point of the command ``ringcore``: exit statuses and what is said when something is wrong.

Status 0: done. 1: a failed check, or a failure while running. 2: wrong usage or input. 130: Ctrl-C. 143: SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from ringcore.cli.failures import describe, expected, status_of
from ringcore.cli.launcher import launched_rank

_EXTRA = ("typer", "rich", "click", "numpy", "ml_dtypes", "threadpoolctl")


class _Terminated(BaseException):
    """SIGTERM arrived."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command with ``arguments``, or those of the process; always raises SystemExit."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        status = _run(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(status)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        from ringcore.cli.commands import app

        return int(app(args=arguments, prog_name="ringcore", standalone_mode=False) or 0)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        _say(f'the command line needs {error.name}, which is not installed: pip install "ringcore[cli]".')
        return 2
    except KeyboardInterrupt:
        return 130
    except _Terminated:
        return 143
    except Exception as error:
        if type(error).__name__ == "Abort":  # what older versions of typer make of Ctrl-C
            return 130
        if (usage := _usage(error)) is not None:
            _say(usage)
            return 2
        if not expected(error):
            raise
        _say(describe(error))
        return status_of(error)


def _usage(error: Any) -> str | None:
    """What typer has to say about wrong options, or None if the error is not typer's."""
    if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
        return None
    command = getattr(getattr(error, "ctx", None), "command_path", "ringcore")
    message = str(error.format_message()).strip() or "a command is missing."
    return f"{message.rstrip('.')}. See {command} --help."


def _say(message: str) -> None:
    """One message, from rank 0 alone."""
    if launched_rank() == 0:
        print(f"ringcore: error: {message}", file=sys.stderr, flush=True)


def _terminate(*_: object) -> None:
    raise _Terminated
