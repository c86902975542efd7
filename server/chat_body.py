"""What clients may ask of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ..runtime.params import MAX_LOGPROBS
from .protocol import MAX_INT, NEUTRAL, Absent, Body, GenerationBody, Off, one_or_list

_MAX_MESSAGES = 4096


class TextPart(Body):
    """A part of a message that is text, the only kind this server reads."""

    type: Annotated[Literal["text"], NEUTRAL]
    text: str


Content = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<list>")],
    Discriminator(one_or_list),
]


class Message(Body):
    """One turn of a chat. A `developer` is the newer name of a `system`."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content
    tool_call_id: str | None = None

    name: Absent = None
    refusal: Absent = None
    audio: Absent = None
    annotations: Absent = None
    function_call: Absent = None
    tool_calls: Absent = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it, its parts joined into one text."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "".join(parts)}
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
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
