"""What the ranks tell each other beside the agreement of a call."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from ringcore import Transport


def gathered(host: Transport, note: Any) -> list[Any]:
    """Every rank's note, of what JSON can hold."""
    return [json.loads(answer) for answer in host.gather(json.dumps(note).encode())]


def patience(host: Transport) -> float:
    """The seconds that a rank waits for its peers: the host transport's, else RINGCORE_TIMEOUT's, else 120."""
    given = getattr(host, "timeout", None) or os.environ.get("RINGCORE_TIMEOUT", "120")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    return seconds if seconds > 0 else 120.0
