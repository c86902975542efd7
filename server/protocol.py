"""What clients may ask: the request bodies of the OpenAI API, as far as they are implemented.

Every field is either implemented, or accepts only the values that ask for nothing: any other value
is answered 400 `unsupported_parameter`, never ignored. Knows shapes and bounds, not the model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ..runtime.request import (
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
    SamplingParams,
)
from .errors import UNSUPPORTED

_MAX_INT = 2**31 - 1
_MAX_MESSAGES = 4096
_MAX_PROMPTS = 1024  # whatever the operator allows, so that reading a body stays quick
_LEGACY_MAX_TOKENS = 16


def _neutral_only(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        neutral = handler(value)
    except ValidationError:
        neutral = ...
    # A literal 1 compares equal to true, but true is no number.
    if neutral is ... or isinstance(value, bool) != isinstance(neutral, bool):
        raise PydanticCustomError(UNSUPPORTED, "this server does not implement this value")
    return neutral


_NEUTRAL = WrapValidator(_neutral_only)
Absent = Annotated[None, _NEUTRAL]
Off = Annotated[Literal[False] | None, _NEUTRAL]
On = Annotated[Literal[True] | None, _NEUTRAL]
Zero = Annotated[Literal[0] | None, _NEUTRAL]
One = Annotated[Literal[1] | None, _NEUTRAL]
Empty = Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, _NEUTRAL]


def _one_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<one>"


def _prompt_shape(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "<id lists>"
    return "<texts>" if isinstance(first, str) else "<ids>"


Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_INT)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[
        list[Text], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True), Tag("<texts>")
    ]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(max_length=_MAX_PROMPTS, fail_fast=True), Tag("<id lists>")],
    Discriminator(_prompt_shape),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<one>")]
    | Annotated[
        list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("<list>")
    ],
    Discriminator(_one_or_list),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """How to stream. Obfuscation is never added, whatever is asked."""

    include_usage: bool = Field(False, description="One more chunk at the end, with the usage.")
    include_obfuscation: bool | None = None


class GenerationBody(_Body):
    """The fields that completions and chats share."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=_MAX_INT)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted, and neither used nor kept.")

    n: One = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    repetition_penalty: One = None
    logit_bias: Empty = None

    @field_validator("stream_options")
    @classmethod
    def _options_need_a_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "only allowed when stream is true")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's parameters, with OpenAI's defaults for what is not given.

        Raises:
            RequestError: the fields contradict each other.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=tuple(stop),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt = Field(description="One text, several, the tokens of one, or of several.")

    best_of: One = None
    echo: Off = None
    logprobs: Off = None
    suffix: Annotated[Literal[""] | None, _NEUTRAL] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt by itself: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | list[int]], self.prompt)

    @property
    def token_limit(self) -> int:
        """At most so many new tokens for each prompt."""
        return _LEGACY_MAX_TOKENS if self.max_tokens is None else self.max_tokens


class TextPart(_Body):
    """A part of a message that is text, the only kind this server reads."""

    type: Annotated[Literal["text"], _NEUTRAL]
    text: str


Content = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<list>")],
    Discriminator(_one_or_list),
]


class Message(_Body):
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


class TextFormat(_Body):
    """The answer is text."""

    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    metadata: dict[str, str] | None = Field(None, description="Accepted, not kept.")
    safety_identifier: str | None = Field(None, description="Accepted, not kept.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes no answer.")

    logprobs: Off = None
    top_logprobs: Absent = None
    response_format: Annotated[TextFormat | None, _NEUTRAL] = None
    tools: Absent = None
    tool_choice: Annotated[Literal["none", "auto"] | None, _NEUTRAL] = None
    parallel_tool_calls: bool | None = Field(None, description="Without tools it asks nothing.")
    functions: Absent = None
    function_call: Annotated[Literal["none", "auto"] | None, _NEUTRAL] = None
    modalities: Annotated[list[Literal["text"]] | None, _NEUTRAL] = None
    audio: Absent = None
    prediction: Absent = None
    reasoning_effort: Annotated[Literal["none"] | None, _NEUTRAL] = None
    verbosity: Annotated[Literal["medium"] | None, _NEUTRAL] = None
    service_tier: Annotated[Literal["auto", "default"] | None, _NEUTRAL] = None
    store: Off = None
    web_search_options: Absent = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        older = info.data.get("max_tokens")
        if value is not None and older is not None and value != older:
            raise PydanticCustomError("two_limits", "differs from max_tokens, its older name")
        return value

    @property
    def token_limit(self) -> int | None:
        """At most so many new tokens; None is as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
