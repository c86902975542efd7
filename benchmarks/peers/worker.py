"""What the process of every engine does: load once, then answer one measurement a line.

Runs in environments that hold one engine each, so it needs nothing but Python. A request and an
answer are one line of JSON each; whatever else an engine prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

VOCABULARY = 40_000  # ids below are ordinary tokens of SmolLM2


class Worker(Protocol):
    """Something loaded that can be measured."""

    version: str

    def answer(self, ask: dict[str, Any], salt: int) -> dict[str, Any]:
        """Measure what is asked; `salt` counts the requests."""


class Engine:
    """An engine with one model, on a number of threads that was given to it."""

    batches = False  # whether `decode` knows more than one sequence

    def prefill(self, ids: list[int]) -> float:
        """Seconds from a prompt to the scores of its next token, nothing remembered before."""
        raise NotImplementedError

    def decode(self, depth: int, count: int, batch: int) -> float:
        """Seconds for `count` tokens, one at a time, of each of `batch` sequences of `depth`."""
        raise NotImplementedError

    def answer(self, ask: dict[str, Any], salt: int) -> dict[str, Any]:
        """Seconds of one task of engines.py; None for a batch where there are none."""
        if ask["phase"] == "prefill":
            return {"seconds": self.prefill(fresh_ids(ask["tokens"], salt))}
        if ask["batch"] > 1 and not self.batches:
            return {"seconds": None}
        return {"seconds": self.decode(ask["depth"], ask["tokens"], ask["batch"])}


def fresh_ids(count: int, salt: int) -> list[int]:
    """A prompt that no engine has seen before, since some remember prompts."""
    return [(i * 7919 + 131 * salt) % VOCABULARY + 100 for i in range(count)]


def serve(load: Callable[[str, int], Worker]) -> None:
    """Load `sys.argv[1]` on `sys.argv[2]` threads and answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = time.perf_counter()
    worker = load(sys.argv[1], int(sys.argv[2]))
    ready = {"version": worker.version, "load_s": time.perf_counter() - start}
    print(json.dumps(ready), file=answers, flush=True)
    for salt, line in enumerate(sys.stdin):
        found = worker.answer(json.loads(line), salt)
        print(json.dumps({**found, "peak_rss_mib": _peak_mib()}), file=answers, flush=True)


def _peak_mib() -> int:
    """Of this program alone: what getrusage tells includes what the process was forked from."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    return 0
