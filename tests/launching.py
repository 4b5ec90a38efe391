"""Starting programs of several processes, and what they leave behind."""

import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def environment(**further):
    """Variables for ranks that find `scenes`, have one thread each and do not wait for long."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RINGCORE_TIMEOUT": "20", **further}


def run(command, variables, timeout):
    """(exit status, {rank: its lines}, all that came out)."""
    done = subprocess.run(command, env=variables, timeout=timeout, capture_output=True, text=True)
    return done.returncode, lines_of(done.stdout), done.stdout + done.stderr


def lines_of(text):
    """{rank: its lines}."""
    lines = {}
    for rank, line in re.findall(r"^rank (\d+): (.*)$", text, re.MULTILINE):
        lines.setdefault(int(rank), []).append(line)
    return lines


def processes(name):
    """The processes whose command holds this name."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return {line for line in listed.splitlines() if name in line}
