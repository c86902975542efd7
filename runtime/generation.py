"""Carries one request through the model, token by token. Knows no threads and no queues."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .model import Model
from .request import FinishReason, GenerationRequest, TextDelta
from .sampler import make_generator, sample
from .stops import StopFinder

PREFILL_CHUNK_TOKENS = 256  # an abort is noticed between chunks


class Generation:
    """One request in progress. `step` until it gives a reason to stop."""

    def __init__(self, model: Model, request: GenerationRequest) -> None:
        self._model, self._params = model, request.params
        self._prompt = torch.tensor(request.prompt_ids, dtype=torch.int64)
        self._limit = min(model.max_model_len, len(request.prompt_ids) + request.params.max_tokens)
        self._cache = model.decoder.new_cache(self._limit)
        self._generator = make_generator(request.params)
        self._text = model.tokenizer.stream()
        self._stops = StopFinder(request.params.stop)
        self._last = 0
        self._logits: Tensor | None = None
        self.completion_tokens = 0
        self.first_token_at: float | None = None

    def step(self, emit: Callable[[TextDelta], None]) -> FinishReason | None:
        """Read one chunk of the prompt, or write one token; a reason once the request is done.

        Raises:
            HalfweaveError: the model computed logits that are not numbers.
        """
        if self._cache.length < len(self._prompt):
            self._prefill()
            return None
        if self._logits is None:
            self._forward(torch.tensor([self._last]))
        return self._write(emit)

    def _prefill(self) -> None:
        start = self._cache.length
        self._forward(self._prompt[start : start + PREFILL_CHUNK_TOKENS])

    def _forward(self, token_ids: Tensor) -> None:
        hidden = self._model.decoder.forward(token_ids, self._cache)
        if self._cache.length >= len(self._prompt):
            self._logits = self._model.decoder.logits(hidden[-1])

    def _write(self, emit: Callable[[TextDelta], None]) -> FinishReason | None:
        logits = self._allowed(self._logits)
        self._logits = None
        token = sample(logits, self._params, self._generator)
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self._last = token
        self.completion_tokens += 1
        if token in self._model.tokenizer.eos_ids and not self._params.ignore_eos:
            self._flush(token, emit)
            return "stop"
        self._say(token, self._text.push(token), emit)
        if self._stops.found:
            return "stop"
        if len(self._prompt) + self.completion_tokens >= self._limit:
            self._flush(None, emit)
            return "stop" if self._stops.found else "length"
        return None

    def _allowed(self, logits: Tensor | None) -> Tensor:
        assert logits is not None
        if self.completion_tokens >= self._params.min_tokens or self._params.ignore_eos:
            return logits
        logits = logits.clone()
        logits[list(self._model.tokenizer.eos_ids)] = float("-inf")
        return logits

    def _say(self, token: int, text: str, emit: Callable[[TextDelta], None]) -> None:
        if self.completion_tokens >= self._params.min_tokens:
            text = self._stops.push(text)
        emit(TextDelta(text, (token,)))

    def _flush(self, token: int | None, emit: Callable[[TextDelta], None]) -> None:
        """The end is near: what was held back is certain now."""
        text = self._stops.push(self._text.finish())
        if not self._stops.found:
            text += self._stops.finish()
        if text or token is not None:
            emit(TextDelta(text, () if token is None else (token,)))
