"""The tools of one request: which there are, which of them may or must be called. OpenAI's terms.

Knows no shapes of requests (tool_protocol.py) and not how a call is written (tool_text.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RequestError
from ..runtime.grammar import CallForm, Grammar, GrammarCompiler
from .tool_text import CALL_END, CALL_TRIGGER, call_begin

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask the client to call.

    `parameters` is a JSON schema of an object, None for a function without any. With `strict` it
    is refused if it has keywords that cannot be kept; else those are ignored.

    Raises:
        RequestError: the name is none, or the parameters are no object.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RequestError("a tool's name has 1 to 64 letters, digits, '_' and '-'", "tools")
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise RequestError(f"{self.name}: parameters must be of type object", "tools")

    def described(self) -> dict[str, Any]:
        """The tool as chat templates and models know it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self._arguments()}}

    def form(self) -> CallForm:
        """What a call of it looks like."""
        return CallForm(call_begin(self.name), self._arguments(), CALL_END, self.strict)

    def _arguments(self) -> dict[str, Any]:
        return _NOTHING if self.parameters is None else {"type": "object", **self.parameters}


@dataclass(frozen=True)
class ToolChoice:
    """Whether a tool is called: never, as the model likes, or surely; `names` are all that may be.

    None of `names` is no restriction.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ToolSet:
    """The tools of a request that has some.

    With `parallel` an answer may have several calls.

    Raises:
        RequestError: there are none or too many, two have one name, or the choice names another.
    """

    tools: tuple[Tool, ...]
    choice: ToolChoice = ToolChoice()
    parallel: bool = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.tools) <= MAX_TOOLS:
            raise RequestError(f"there must be 1 to {MAX_TOOLS} tools", "tools")
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            twice = next(name for at, name in enumerate(names) if name in names[:at])
            raise RequestError(f"two tools are named {twice}", "tools")
        if self.choice.names == ():
            raise RequestError("at least one tool must be allowed", "tool_choice")
        unknown = [name for name in self.choice.names or () if name not in names]
        if unknown:
            raise RequestError(f"no tool is named {unknown[0][:64]}", "tool_choice")

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of: those that it may call."""
        if self.choice.mode == "none":
            return ()
        allowed = self.choice.names
        return tuple(tool for tool in self.tools if allowed is None or tool.name in allowed)

    def described(self) -> list[dict[str, Any]]:
        """The offered tools as chat templates and models know them."""
        return [tool.described() for tool in self.offered]

    def grammar(self, compiler: GrammarCompiler) -> Grammar | None:
        """What the answer must look like; None where no tool may be called.

        Raises:
            RequestError: parameters are no usable schema.
        """
        forms = [tool.form() for tool in self.offered]
        if not forms:
            return None
        trigger = CALL_TRIGGER if self.choice.mode == "auto" else None
        return compiler.tool_calls(forms, trigger, self.parallel)


def tool_set(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> ToolSet | None:
    """The tools of a request, None for a request without, with OpenAI's defaults.

    Raises:
        RequestError: as ToolSet does; or a tool must be called and there are none.
    """
    choice = choice or ToolChoice()
    if tools is not None:
        return ToolSet(tuple(tools), choice, parallel is not False)
    if choice.mode == "required" or choice.names is not None:
        raise RequestError("a tool must be chosen, but there are no tools", "tool_choice")
    return None
