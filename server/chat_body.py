"""What clients may ask of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..errors import RequestError
from ..runtime.params import MAX_LOGPROBS
from .protocol import MAX_INT, NEUTRAL, Absent, Body, GenerationBody, Off, one_or_list
from .tool_protocol import ResponseFormat, ToolBody, ToolChoiceBody, Turn, tool_choice
from .tools import MAX_TOOLS, ToolSet, tool_set

_MAX_MESSAGES = 4096
_MAX_PARTS = 1024
_MAX_VARIABLES = 16


class TextPart(Body):
    """A part of a message that is text, the only kind this server reads."""

    type: Annotated[Literal["text"], NEUTRAL]
    text: str


Content = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[
        list[TextPart], Field(min_length=1, max_length=_MAX_PARTS, fail_fast=True), Tag("<list>")
    ],
    Discriminator(one_or_list),
]


class Message(Turn):
    """One turn of a chat. A `developer` is the newer name of a `system`."""

    content: Annotated[Content | None, Field(validate_default=True)] = None

    name: Absent = None
    refusal: Absent = None
    audio: Absent = None
    annotations: Absent = None
    function_call: Absent = None

    @field_validator("content")
    @classmethod
    def _something_is_said(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("content", "only a turn with tool calls has none")
        return value

    def for_template(self) -> dict[str, Any]:
        """The message as templates and tool_text.py know it, its parts joined into one text."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self._text}
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls is not None:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message

    @property
    def _text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


TemplateName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
TemplateValue = Annotated[bool | int | float | str, Field(union_mode="left_to_right")]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoiceBody | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[TemplateName, TemplateValue] | None = Field(
        None, max_length=_MAX_VARIABLES, description="Variables of the model's chat template."
    )
    add_generation_prompt: bool | None = Field(None, description="True unless given.")
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message; add_generation_prompt must be false."
    )
    metadata: dict[str, str] | None = Field(None, description="Accepted, not kept.")
    safety_identifier: str | None = Field(None, description="Accepted, not kept.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes no answer.")

    functions: Absent = None
    function_call: Annotated[Literal["none", "auto"] | None, NEUTRAL] = None
    modalities: Annotated[list[Literal["text"]] | None, NEUTRAL] = None
    audio: Absent = None
    prediction: Absent = None
    reasoning_effort: Annotated[Literal["none"] | None, NEUTRAL] = None
    verbosity: Annotated[Literal["medium"] | None, NEUTRAL] = None
    service_tier: Annotated[Literal["auto", "default"] | None, NEUTRAL] = None
    store: Off = None
    web_search_options: Absent = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        older = info.data.get("max_tokens")
        if value is not None and older is not None and value != older:
            raise PydanticCustomError("two_limits", "differs from max_tokens, its older name")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _top_of_something(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "only allowed when logprobs is true")
        return value

    @property
    def token_limit(self) -> int | None:
        """At most so many new tokens; None is as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scored(self) -> int | None:
        """How many likely tokens are reported beside each that is written; None for no report."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def has_form(self) -> bool:
        """Whether an answer must look like something, so that a grammar is compiled."""
        formatted = self.response_format is not None and self.response_format.type != "text"
        return formatted or (self.tools is not None and self.tool_choice != "none")

    @property
    def tool_set(self) -> ToolSet | None:
        """The tools that are offered, None where there are none.

        Raises:
            RequestError: see tools.py; or the answer is to be of some format besides.
        """
        tools = None if self.tools is None else [body.tool() for body in self.tools]
        found = tool_set(tools, tool_choice(self.tool_choice), self.parallel_tool_calls)
        formatted = self.response_format is not None and self.response_format.type != "text"
        if found is not None and found.offered and formatted:
            raise RequestError(
                "response_format: an answer that may call tools has no other format",
                "response_format",
            )
        return found
