"""A pytest plugin that tells why tests failed, and from where the code under test was imported.

The file named by RINGCORE_WITNESS gets one line of JSON for each failed test and for each module of ringcore that did
not come from the tree named by RINGCORE_TREE. Written before anything else hears of the failure: under mpiexec a rank
whose test failed ends the whole run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Write down the failure of a test, less those of its fixtures, and every stranger among the modules."""
    for name in _strangers():
        _write(stranger=name)
    if call.when != "call" or call.excinfo is None or item.get_closest_marker("xfail"):
        return
    error = call.excinfo.value
    if not isinstance(error, pytest.skip.Exception):
        errors = [cls.__name__ for each in _leaves(error) for cls in type(each).__mro__]
        _write(test=item.nodeid, errors=errors, message=(str(error).strip() or errors[0]).splitlines()[0])


def _leaves(error: BaseException) -> list[BaseException]:
    """The error, or those that Hypothesis found and put in a group."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]


def _strangers() -> list[str]:
    tree = Path(os.environ["RINGCORE_TREE"])
    ours = [(name, module) for name, module in sys.modules.items() if name.partition(".")[0].startswith("ringcore")]
    found = [(name, getattr(module, "__file__", None)) for name, module in ours]
    return [name for name, file in found if file is None or not Path(file).is_relative_to(tree)]


def _write(**line: Any) -> None:
    with open(os.environ["RINGCORE_WITNESS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
