"""The other side of child.py: how a script answers lines of JSON within its limits."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def read_setup() -> dict[str, Any]:
    """The first line: what the script works with, and its limits in "bytes" and "seconds"."""
    setup: dict[str, Any] = json.loads(sys.stdin.readline())
    return setup


def serve(setup: Mapping[str, Any], answer: Callable[[Any], Mapping[str, str]]) -> None:
    """Answer every further line until standard input ends.

    Memory is bounded from here on, after all that is imported; processor time for each line, by the
    kernel, which holds even inside one endless operation.
    """
    _bound_memory(setup["bytes"])
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        reply = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _bound_memory(extra_bytes: int) -> None:
    """Let the process grow by so much and no more, where the system can tell how large it is."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))
