"""The offline interface: a path in, text out."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import RequestError
from .engine import Engine
from .model import Model, load_model
from .request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    Timings,
    Usage,
)
from .tokenizer import Message

_SCORE_CHUNK_TOKENS = 256  # bounds the [tokens, vocab] buffer


@dataclass(frozen=True)
class Completion:
    """One finished generation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Score:
    """Log-probability (nats) of each token of a text given those before; the first has none."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # one less than token_ids

    @property
    def total(self) -> float:
        """Log-probability of the text after its first token."""
        return sum(self.logprobs)


class LLM:
    """A model in this process.

    with LLM("OUT") as llm:
        print(llm.generate("Once upon a time")[0].text)
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str = "auto",
        verify: bool = True,
        head_bits: int = 8,
        kv_bits: int = 16,
        device: str = "cpu",
    ) -> None:
        """Load a dense or packed model directory; see `load_model` for the rest and for errors."""
        self.model: Model = load_model(path, dtype, verify, head_bits, kv_bits, device)
        self._engine = Engine(self.model, max_waiting=2**20)
        self._one_at_a_time = threading.Lock()  # the engine's thread and `score` share the model

    def generate(
        self, prompts: str | Sequence[str], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Continue each prompt; results in the order of the prompts.

        Raises:
            RequestError: a prompt is empty or does not fit the context.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return [self._complete(self.model.tokenizer.encode(text), params) for text in texts]

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation of {"role", "content"} messages.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        return self._complete(self.model.tokenizer.apply_chat_template(messages), params)

    def score(self, text: str) -> Score:
        """Log-probabilities of a text's own tokens.

        Raises:
            RequestError: the text has fewer than two tokens, or more than the context.
        """
        ids = self.model.tokenizer.encode(text)
        if not 2 <= len(ids) <= self.model.max_model_len:
            raise RequestError(
                f"the text has {len(ids)} tokens; 2 to {self.model.max_model_len} can be scored"
            )
        with self._one_at_a_time:
            return Score(tuple(ids), tuple(self._logprobs(ids)))

    def _logprobs(self, ids: Sequence[int]) -> list[float]:
        tokens = torch.tensor(ids)
        decoder = self.model.decoder
        cache = decoder.new_cache(len(ids))
        logprobs: list[float] = []
        for start in range(0, len(ids) - 1, _SCORE_CHUNK_TOKENS):
            stop = min(start + _SCORE_CHUNK_TOKENS, len(ids) - 1)
            logits = decoder.logits(decoder.forward(tokens[start:stop], cache))
            chosen = tokens[start + 1 : stop + 1, None]
            logprobs += torch.log_softmax(logits, dim=-1).gather(1, chosen).flatten().tolist()
        return logprobs

    def _complete(self, prompt_ids: Sequence[int], params: SamplingParams | None) -> Completion:
        request = GenerationRequest(uuid.uuid4().hex, tuple(prompt_ids), params or SamplingParams())
        with self._one_at_a_time:
            return _collect(list(self._engine.stream(request)))

    def close(self) -> None:
        """Stop the engine's thread."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _collect(events: Sequence[Event]) -> Completion:
    deltas = [event for event in events if isinstance(event, TextDelta)]
    last = events[-1]
    if isinstance(last, Failed):
        raise last.error
    assert isinstance(last, Finished)
    return Completion(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        last.reason,
        last.usage,
        last.timings,
    )
