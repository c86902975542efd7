"""How models are told of tools, and how calls are written: the form that Hermes and Qwen share.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

A chat template that knows this form is left to write it; for any other it is put into the messages.
Templates with a form of their own count as such, since only this one can be read back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .body import check_whole

CALL_TRIGGER = "<tool_call>"
CALL_END = "}\n</tool_call>"
_KNOWN_BY = ("tools", "tool_calls", "arguments", CALL_TRIGGER, "<tool_response>")
_OTHER_FORM = "<function="  # Qwen3-Coder's, in the same tags
_INTRODUCTION = (
    "You can call functions to help with the user's request. Their signatures, as JSON, one on a "
    "line:\n<tools>\n{tools}\n</tools>\n\n"
    "To call a function, write its name and its arguments as JSON between these tags:\n"
    '<tool_call>\n{{"name": <function name>, "arguments": <object of arguments>}}\n</tool_call>\n'
    "What it gives back follows between <tool_response> and </tool_response>."
)

Message = Mapping[str, Any]


def call_begin(name: str) -> str:
    """A call up to its arguments."""
    return f'{CALL_TRIGGER}\n{{"name": {json.dumps(name)}, "arguments": '


def template_knows_calls(template: str | None) -> bool:
    """Whether a chat template writes tools, calls and results in this form by itself."""
    return (
        template is not None
        and all(word in template for word in _KNOWN_BY)
        and _OTHER_FORM not in template
    )


def conversation(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: str | None
) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]] | None]:
    """The messages, and the tools for the template's variable of that name; None for none.

    `messages` are OpenAI's; calls in them, results, and `tools` become text where the template
    does not know them.
    """
    if template_knows_calls(template):
        return [_for_template(message) for message in messages], list(tools) or None
    written = _as_text(messages)
    return _introduced(written, tools) if tools else written, None


def _for_template(message: Message) -> dict[str, Any]:
    """The message with its arguments as objects, which is what templates write out."""
    given = {**message, "content": message.get("content") or ""}
    calls = message.get("tool_calls")
    if calls:
        given["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call)}} for call in calls
        ]
    return given


def _as_text(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Calls become a part of what the assistant says, and results what the user says."""
    written: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        text = message.get("content") or ""
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{text}\n</tool_response>"
        if is_result and after_result:  # one turn for all, since templates want them to alternate
            written[-1]["content"] += f"\n{text}"
        elif is_result:
            written.append({"role": "user", "content": text})
        else:
            calls = [_call(call) for call in message.get("tool_calls") or ()]
            content = "\n".join([text, *calls] if text else calls)
            written.append({"role": message["role"], "content": content})
        after_result = is_result
    return written


def _introduced(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=lines)
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _call(call: Mapping[str, Any]) -> str:
    arguments = json.dumps(_object(call), ensure_ascii=False)
    return f"{call_begin(call['function']['name'])}{arguments}{CALL_END}"


def _object(call: Mapping[str, Any]) -> Any:
    """A call's arguments; a text that is no JSON, as the end of a cut-off answer, stays one.

    So does one that escapes half of a surrogate pair, which no tokenizer can read.
    """
    arguments = call["function"]["arguments"]
    try:
        found = json.loads(arguments)
        check_whole(found)
    except (ValueError, RecursionError):
        return arguments
    return found
