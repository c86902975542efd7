"""What a caller asks of the engine, and the events it gets back.

Everything here is checked when it is made, so whatever reaches the engine is legal by itself.
Whether it fits the loaded model (vocabulary, context length) is the engine's to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RequestError

MAX_TEMPERATURE = 2.0
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1000
GREEDY_BELOW = 1e-5
_MAX_INT = 2**31 - 1

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next tokens, and when to stop.

    Attributes:
        max_tokens: at most so many new tokens, 1 or more.
        temperature: 0 to 2; below 1e-5 the most likely token is taken (greedy).
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
        seed: makes the request's random draws repeatable; None draws a fresh seed.
        stop: up to 4 strings; the text ends before the first of them to appear.
        ignore_eos: go on after an end-of-sequence token.
        min_tokens: no end-of-sequence token, and no stop string, counts before so many tokens.

    Raises:
        RequestError: a field is of the wrong type or out of range; `param` names it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, _MAX_INT)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("top_k", self.top_k, 0, _MAX_INT)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p must be above 0", param="top_p")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos must be true or false", param="ignore_eos")
        _check_stop(self.stop)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a random draw."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. `id` is the caller's, unique among the requests in flight.

    Raises:
        RequestError: the prompt is empty, or holds anything but non-negative integers.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if not all(type(token) is int and token >= 0 for token in self.prompt_ids):
            raise RequestError("token ids must be integers of 0 or more", param="prompt")


@dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int

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
class TextDelta:
    """More text, with the tokens taken since the delta before.

    Text may lag behind its tokens while a character is incomplete or a stop string may be forming.
    """

    text: str
    token_ids: tuple[int, ...]


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


Event = TextDelta | Finished | Failed


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int:
        raise RequestError(f"{name} must be an integer", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low} and {high}, given {value}", param=name)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if type(value) not in (int, float) or not -1e300 < value < 1e300:
        raise RequestError(f"{name} must be a finite number", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low:g} and {high:g}", param=name)


def _check_stop(stop: Any) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(item, str) for item in stop):
        raise RequestError("stop must be a tuple of strings", param="stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop holds {len(stop)} strings, at most {MAX_STOP_STRINGS}", "stop")
    if not all(0 < len(item) <= MAX_STOP_CHARS for item in stop):
        raise RequestError(f"a stop string has 1 to {MAX_STOP_CHARS} characters", param="stop")
