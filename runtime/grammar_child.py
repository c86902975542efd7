"""The process that tries grammars out: run as a script by grammar.py, never imported.

Reads lines of JSON from standard input, the first with the limits, each further one a grammar;
answers each with a line {"error": ...}, which is empty for a grammar that can be used. One that
takes too long, too much memory or too deep a stack ends this process and no other.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until standard input ends."""
    setup = json.loads(sys.stdin.readline())
    threading.stack_size(setup["stack_bytes"])
    server = threading.Thread(target=_serve, args=(setup,))
    server.start()
    server.join()


def _serve(setup: dict[str, Any]) -> None:
    import llguidance

    # The vocabulary changes how fast a grammar compiles, but hardly: single bytes will do.
    tokenizer = llguidance.LLTokenizer("byte")
    limits = llguidance.LLParserLimits(**setup["limits"])
    _bound_memory(setup["bytes"])
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps({"error": matcher.get_error()}) + "\n")
        sys.stdout.flush()


def _bound_memory(extra_bytes: int) -> None:
    """Let the process grow by so much and no more, where the system can tell how large it is."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))


if __name__ == "__main__":
    main()
