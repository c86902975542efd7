"""How to choose the next tokens, and when to stop: what a caller may ask of sampling.

Everything is checked when it is made. Whether token ids are in the vocabulary is the engine's to
say, which knows the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

MAX_TEMPERATURE = 2.0
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1000
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0
MIN_REPETITION = 0.01  # far less would divide a score beyond what a float holds
GREEDY_BELOW = 1e-5
_MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next tokens, and when to stop.

    Scores are changed in this order: `logit_bias`, penalties, temperature, top-k, top-p, min-p.

    Attributes:
        max_tokens: at most so many new tokens; 0 only reads the prompt.
        temperature: 0 to 2; below 1e-5 the most likely token is taken (greedy).
        top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
        repetition_penalty: 0.01 to 2; scores of tokens seen in prompt or answer are divided by it
            where positive, and multiplied where negative (Keskar et al., 1909.05858).
        presence_penalty: -2 to 2; taken from the score of each token that the answer has.
        frequency_penalty: -2 to 2; taken once for every time that the answer has it.
        logit_bias: (token id, what is added to its score, -100 to 100); -100 all but forbids.
        seed: makes the request's random draws repeatable; None draws a fresh seed.
        stop: up to 4 strings; the text ends before the first of them to appear.
        stop_token_ids: tokens that end the answer as the model's own end tokens do.
        include_stop: whether the text keeps the stop string or stop token that ended it.
        ignore_eos: go on after the model's own end tokens.
        min_tokens: no end token, and no stop string, counts before so many tokens.
        skip_special_tokens: leave the text of special tokens out of the answer's.
        logprobs: report the log-probability of each token written, and of so many most likely
            ones, 0 to 20, by the model's own scores before any of the changes above.
        prompt_logprobs: the same for the tokens of the prompt.

    Raises:
        RequestError: a field is of the wrong type or out of range; `param` names it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0, _MAX_INT)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_int("top_k", self.top_k, 0, _MAX_INT)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        _check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, MIN_REPETITION, MAX_PENALTY)
        _check_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        if self.top_p == 0:
            raise RequestError("top_p must be above 0", param="top_p")
        for name in ("ignore_eos", "include_stop", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false", param=name)
        _check_stop(self.stop)
        _check_stop_tokens(self.stop_token_ids)
        _check_biases(self.logit_bias)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a random draw."""
        return self.temperature < GREEDY_BELOW

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token id that is named here."""
        return (*self.stop_token_ids, *(token for token, _ in self.logit_bias))


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


def _check_stop_tokens(tokens: Any) -> None:
    name = "stop_token_ids"
    if not isinstance(tokens, tuple) or not all(type(t) is int and t >= 0 for t in tokens):
        raise RequestError(f"{name} must be a tuple of token ids", param=name)
    if len(tokens) > MAX_STOP_TOKENS:
        raise RequestError(f"{name} holds {len(tokens)} tokens, at most {MAX_STOP_TOKENS}", name)


def _check_biases(biases: Any) -> None:
    name = "logit_bias"
    if not isinstance(biases, tuple):
        raise RequestError(f"{name} must be a tuple of token ids with numbers", param=name)
    if len(biases) > MAX_BIASES:
        raise RequestError(f"{name} holds {len(biases)} tokens, at most {MAX_BIASES}", name)
    for token, bias in biases:
        if type(token) is not int or token < 0:
            raise RequestError(f"{name}: {token!r} is no token id", param=name)
        _check_number(name, bias, -MAX_BIAS, MAX_BIAS)
