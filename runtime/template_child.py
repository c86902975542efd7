"""The process that renders chat templates: run by template.py, never imported.

Answers each conversation with {"text": ...} or {"error": ...}.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .child_side import read_setup, serve

_MAX_TEXT_CHARS = 2**23
_MAX_ERROR_CHARS = 300


def main() -> None:
    """Serve until standard input ends."""
    setup = read_setup()
    from transformers.utils.chat_template_utils import render_jinja_template

    serve(setup, partial(_reply, render_jinja_template, setup))


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


if __name__ == "__main__":
    main()
