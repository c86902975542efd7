"""Renders chat templates in a small process of its own, bounded in processor time and memory.

A template comes from the checkpoint and is hostile until proved otherwise. transformers' sandboxed
Jinja keeps it from reaching Python; but it can still loop for ever or fill the memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .child import Child, ChildEnded

TEMPLATE_SECONDS = 5.0  # of processor time, so that a busy machine is no reason to fail
TEMPLATE_BYTES = 2**29
_CHILD = "template_child"
# What the library's own function for it takes; a template's variables cannot have these names.
_RESERVED = {
    "conversations",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "return_assistant_tokens_mask",
    "continue_final_message",
    "add_generation_prompt",
}

Scalar = bool | int | float | str


class TemplateRenderer(Child):
    """One chat template, ready to be rendered from any thread."""

    def __init__(
        self, template: str, variables: Mapping[str, Any], seconds: float = TEMPLATE_SECONDS
    ) -> None:
        """`variables` are what the template always sees: the special tokens."""
        setup = {
            "template": template,
            "variables": dict(variables),
            "seconds": seconds,
            "bytes": TEMPLATE_BYTES,
        }
        super().__init__(_CHILD, setup)
        self._names = _RESERVED | set(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Scalar] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation.

        `continue_final_message` leaves the last message open, so that it can be written on.

        Raises:
            RequestError: the template refuses the messages, or passes its limits; or a variable
                has a name that is taken.
        """
        taken = sorted(self._names.intersection(variables or ()))
        if taken:
            raise RequestError(
                f"a chat template's variable cannot be named {taken[0]}", "chat_template_kwargs"
            )
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "a new message cannot be begun while the last one is continued",
                "continue_final_message",
            )
        request = {
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "variables": dict(variables or {}),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the messages are no JSON: {error}", "messages") from error
        return self._rendered(line)

    def _rendered(self, line: str) -> str:
        try:
            reply = self.ask(line)
        except ChildEnded as ended:
            what = "took too long on these messages" if ended.too_long else "could not be rendered"
            raise RequestError(f"the chat template {what}", "messages") from ended
        if "text" not in reply:
            error_text = reply.get("error", "")
            raise RequestError(
                f"the chat template refused these messages: {error_text}", "messages"
            )
        return reply["text"]
