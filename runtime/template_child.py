"""The process that renders chat templates: run as a script by template.py, never imported.

Reads lines of JSON from standard input, the first with the template and its limits, each further
one a conversation; answers each with a line {"text": ...} or {"error": ...}. A template that takes
too long is ended by the kernel, which holds even inside one endless operation.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

_MAX_TEXT_CHARS = 2**23
_MAX_ERROR_CHARS = 300


def main() -> None:
    """Serve until standard input ends."""
    setup = json.loads(sys.stdin.readline())
    from transformers.utils.chat_template_utils import render_jinja_template

    _bound_memory(setup["bytes"])
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        reply = _reply(render_jinja_template, setup, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _reply(render: Any, setup: dict[str, Any], request: dict[str, Any]) -> dict[str, str]:
    try:
        texts, _ = render(
            [request["messages"]],
            tools=request["tools"],
            chat_template=setup["template"],
            add_generation_prompt=request["add_generation_prompt"],
            continue_final_message=request["continue_final_message"],
            **setup["variables"],
            **request["variables"],
        )
    except Exception as error:  # a template can raise anything
        return {"error": (str(error) or type(error).__name__)[:_MAX_ERROR_CHARS]}
    if len(texts[0]) > _MAX_TEXT_CHARS:
        return {"error": f"the rendered text has over {_MAX_TEXT_CHARS} characters"}
    return {"text": texts[0]}


def _bound_memory(extra_bytes: int) -> None:
    """Let the process grow by so much and no more, where the system can tell how large it is."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))


if __name__ == "__main__":
    main()
