"""What a caller asks of the engine, and the events it gets back.

Everything here is checked when it is made, so whatever reaches the engine is legal by itself.
Whether it fits the loaded model (vocabulary, context length) is the engine's to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]
MAX_PRIORITY = 2**31 - 1


class Constraint(Protocol):
    """What an answer must look like, token by token. Belongs to one request."""

    def forbid(self, scores: NDArray[np.float32]) -> None:
        """Set the scores [vocab] of tokens that may not come next to -inf, in place."""

    def take(self, token: int) -> None:
        """The token has been written."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        id: the caller's, unique among the requests in flight.
        prompt_ids: one token at least.
        params: how to sample.
        priority: lower ones are begun first, equal ones in the order of their coming.
        salt: only requests of equal salts share what is remembered of equal beginnings; that keeps
            one client from finding out, by timing, what another has asked.
        constraint: what the answer must look like; None for anything.
        goes_on: the answer's text goes on from the prompt's, as a chat's does not.

    Raises:
        RequestError: the prompt is empty, or holds anything but non-negative integers; or the
            priority is out of range.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    salt: bytes = b""
    constraint: Constraint | None = None
    goes_on: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if not all(type(token) is int and token >= 0 for token in self.prompt_ids):
            raise RequestError("token ids must be integers of 0 or more", param="prompt")
        if type(self.priority) is not int or abs(self.priority) > MAX_PRIORITY:
            raise RequestError("priority must be an integer of 32 bits", param="priority")


@dataclass(frozen=True)
class Usage:
    """Tokens read and written; `cached_tokens` of the prompt did not have to be computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Milliseconds of a monotonic clock spent waiting, reading the prompt, and writing.

    Prefill ends with the first token; decode is everything after it.
    """

    queue_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (nats) of a token, and of the most likely ones, the likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PromptScored:
    """The log-probabilities of a prompt's tokens, all but the first; comes before any text."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class TextDelta:
    """More text, with the tokens taken since the delta before.

    Text may lag behind its tokens while a character is incomplete or a stop string may be forming.
    `logprobs` has one entry a token, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a request that came to an end: by itself, or because it was aborted."""

    reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be carried out."""

    error: Exception


Event = PromptScored | TextDelta | Finished | Failed
