"""What clients are told: the answers and stream chunks of the OpenAI API.

Fields that are not set are left out, so that a null is written only where the API has one.
Knows shapes, not how the numbers came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from ..runtime import request as engine

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens read and written by one request, over all of its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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
    logprobs: None
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


class AssistantMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: AssistantMessage
    logprobs: None
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


class Delta(BaseModel):
    """What is new: the role at first, then text, at last nothing."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one reply."""

    index: int
    delta: Delta
    logprobs: None
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
    """Answer of GET /health."""

    status: Literal["ok", "draining", "dead"]


def finish_reason(end: engine.Finished) -> FinishReason:
    """Why a choice ended. An aborted one has no answer, so it has no such reason."""
    return "stop" if end.reason == "stop" else "length"


def usage_of(ends: Sequence[engine.Finished]) -> Usage:
    """Tokens of all choices together."""
    prompt = sum(end.usage.prompt_tokens for end in ends)
    written = sum(end.usage.completion_tokens for end in ends)
    return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


def timings_of(ends: Sequence[engine.Finished]) -> Timings:
    """Time of all choices together."""
    usage = usage_of(ends)
    prompt_ms = sum(end.timings.prefill_ms for end in ends)
    predicted_ms = sum(end.timings.decode_ms for end in ends)
    return Timings(
        cache_n=0,
        prompt_n=usage.prompt_tokens,
        prompt_ms=prompt_ms,
        prompt_per_second=_per_second(usage.prompt_tokens, prompt_ms),
        predicted_n=usage.completion_tokens,
        predicted_ms=predicted_ms,
        predicted_per_second=_per_second(usage.completion_tokens - len(ends), predicted_ms),
        queue_ms=sum(end.timings.queue_ms for end in ends),
    )


def _per_second(tokens: int, milliseconds: float) -> float | None:
    return 1000 * tokens / milliseconds if tokens > 0 and milliseconds > 0 else None
