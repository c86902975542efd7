"""What clients may ask of any endpoint: the fields that completions and chats share.

Every field is either implemented, or accepts only the values that ask for nothing: any other value
is answered 400 `unsupported_parameter`, never ignored. Knows shapes and bounds, not the model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

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

from ..runtime.params import (
    MAX_BIAS,
    MAX_BIASES,
    MAX_PENALTY,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TEMPERATURE,
    MIN_REPETITION,
    SamplingParams,
)
from ..runtime.request import MAX_PRIORITY
from .errors import UNSUPPORTED

MAX_INT = 2**31 - 1
MAX_CHOICES = 16  # answers to one prompt
_MAX_SALT_CHARS = 256


def _neutral_only(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        neutral = handler(value)
    except ValidationError:
        neutral = ...
    # A literal 1 compares equal to true, but true is no number.
    if neutral is ... or isinstance(value, bool) != isinstance(neutral, bool):
        raise PydanticCustomError(UNSUPPORTED, "this server does not implement this value")
    return neutral


NEUTRAL = WrapValidator(_neutral_only)
Absent = Annotated[None, NEUTRAL]
Off = Annotated[Literal[False] | None, NEUTRAL]


def one_or_list(value: Any) -> str:
    """The branch of a union of one thing and a list of such things."""
    return "<list>" if isinstance(value, list) else "<one>"


TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<one>")]
    | Annotated[
        list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True), Tag("<list>")
    ],
    Discriminator(one_or_list),
]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
BiasedToken = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]  # \d would be any digit


class Body(BaseModel):
    """A JSON object of which every key is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """How to stream. Obfuscation is never added, whatever is asked."""

    include_usage: bool = Field(False, description="One more chunk at the end, with the usage.")
    include_obfuscation: bool | None = None


class GenerationBody(Body):
    """The fields that completions and chats share."""

    model: str = Field(min_length=1, max_length=512)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers to each prompt.")
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=MIN_REPETITION, le=MAX_PENALTY)
    logit_bias: dict[BiasedToken, Bias] | None = Field(
        None, max_length=MAX_BIASES, description="By token ids."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(None, description="True unless given.")
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(
        None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Lower ones are begun first."
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=_MAX_SALT_CHARS,
        description="Only requests of one salt share what is remembered of equal beginnings.",
    )
    user: str | None = Field(None, description="Accepted, and neither used nor kept.")

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

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def sampling(
        self,
        max_tokens: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
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
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=bool(self.include_stop_str_in_output),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            skip_special_tokens=self.skip_special_tokens is not False,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
