"""The process that tries grammars out: run by grammar.py, never imported.

Answers each grammar with {"error": ...}, which is empty for one that can be used. One that takes
too long, too much memory or too deep a stack ends this process and no other.
"""

from __future__ import annotations

import threading
from typing import Any

from .child_side import read_setup, serve


def main() -> None:
    """Serve until standard input ends, in a thread whose stack is bounded."""
    setup = read_setup()
    threading.stack_size(setup["stack_bytes"])
    server = threading.Thread(target=_serve, args=(setup,))
    server.start()
    server.join()


def _serve(setup: dict[str, Any]) -> None:
    import llguidance

    # The vocabulary changes how fast a grammar compiles, but hardly: single bytes will do.
    tokenizer = llguidance.LLTokenizer("byte")
    limits = llguidance.LLParserLimits(**setup["limits"])

    def try_out(grammar: str) -> dict[str, str]:
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        return {"error": matcher.get_error()}

    serve(setup, try_out)


if __name__ == "__main__":
    main()
