"""What clients are told: the answers and stream chunks of the OpenAI API.

Fields that are not set are left out, so that a null is written only where the API has one.
Knows shapes, not how the numbers came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from ..runtime import request as engine
from .logprobs import ChatLogprobs, CompletionLogprobs

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """Of the tokens read."""

    cached_tokens: int = Field(description="Those that did not have to be computed.")


class Usage(BaseModel):
    """Tokens read and written by one request, over all of its choices.

    A prompt with several choices counts once.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(BaseModel):
    """An extension, named as in llama.cpp; summed over the choices the object tells of.

    The first token belongs to the prompt's time, so `predicted_per_second` counts the tokens after
    it. Rates are null where nothing was timed.
    """

    cache_n: int = Field(description="Prompt tokens that did not have to be computed.")
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float | None
    queue_ms: float = Field(description="Waiting before the prompt was begun.")


class CompletionChoice(BaseModel):
    """One continuation, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Answer, and stream chunk, of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class FunctionCall(BaseModel):
    """Which function, with what; a JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A function that the model wants called."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class FunctionDelta(BaseModel):
    """The name at first, then pieces of the arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """A piece of one call, told apart by its index."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is new: the role at first, then text or calls, at last nothing."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    """A piece of one reply."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """Stream chunk of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class ModelCard(BaseModel):
    """A model that is served. `root` and `max_model_len` are extensions that clients read."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    permission: list[None]


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of GET /health and /ready."""

    status: Literal["ok", "draining", "dead"]


class Version(BaseModel):
    """Answer of GET /version."""

    version: str


class Tokens(BaseModel):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str


def finish_reason(end: engine.Finished) -> FinishReason:
    """Why a choice ended. An aborted one has no answer, so it has no such reason."""
    return "stop" if end.reason == "stop" else "length"


def usage_of(ends: Sequence[engine.Finished], shared: int = 1) -> Usage:
    """Tokens of all choices together, of which each `shared` have one prompt."""
    read = [end.usage for end in ends[::shared]]
    prompt = sum(usage.prompt_tokens for usage in read)
    written = sum(end.usage.completion_tokens for end in ends)
    cached = sum(usage.cached_tokens for usage in read)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=written,
        total_tokens=prompt + written,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def timings_of(ends: Sequence[engine.Finished]) -> Timings:
    """Time of all choices together."""
    read = sum(end.usage.prompt_tokens for end in ends)
    cached = sum(end.usage.cached_tokens for end in ends)
    written = sum(end.usage.completion_tokens for end in ends)
    prompt_ms = sum(end.timings.prefill_ms for end in ends)
    predicted_ms = sum(end.timings.decode_ms for end in ends)
    return Timings(
        cache_n=cached,
        prompt_n=read - cached,
        prompt_ms=prompt_ms,
        prompt_per_second=_per_second(read - cached, prompt_ms),
        predicted_n=written,
        predicted_ms=predicted_ms,
        predicted_per_second=_per_second(written - len(ends), predicted_ms),
        queue_ms=sum(end.timings.queue_ms for end in ends),
    )


def _per_second(tokens: int, milliseconds: float) -> float | None:
    return 1000 * tokens / milliseconds if tokens > 0 and milliseconds > 0 else None
