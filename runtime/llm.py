"""The offline interface: a path in, text out."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError
from .engine import Engine
from .engine_settings import EngineSettings
from .model import Model, load_model
from .params import SamplingParams
from .request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptScored,
    TextDelta,
    Timings,
    TokenLogprob,
    Usage,
)
from .tokenizer import Message


@dataclass(frozen=True)
class Completion:
    """One finished generation. The log-probabilities are those that were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


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
        self._engine = Engine(self.model, EngineSettings(max_waiting=2**20))

    def generate(
        self, prompts: str | Sequence[str], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Continue all prompts side by side; results in the order of the prompts.

        Raises:
            RequestError: a prompt is empty or does not fit the context.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [self.model.tokenizer.encode(text) for text in texts]
        return self._complete(encoded, params, goes_on=True)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation of {"role", "content"} messages.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        return self._complete([self.model.tokenizer.apply_chat_template(messages)], params)[0]

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
        only_read = SamplingParams(max_tokens=0, prompt_logprobs=0)
        scored = self._complete([ids], only_read)[0].prompt_logprobs
        return Score(tuple(ids), tuple(each.logprob for each in scored))

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None,
        goes_on: bool = False,
    ) -> list[Completion]:
        params = params or SamplingParams()
        requests = [
            GenerationRequest(uuid.uuid4().hex, tuple(ids), params, goes_on=goes_on)
            for ids in prompts
        ]
        streams = [self._engine.stream(request) for request in requests]
        return [_collect(list(stream)) for stream in streams]

    def close(self) -> None:
        """Stop the engine's thread."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _collect(events: Sequence[Event]) -> Completion:
    deltas = [event for event in events if isinstance(event, TextDelta)]
    scored = [event for event in events if isinstance(event, PromptScored)]
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
        tuple(each for delta in deltas for each in delta.logprobs),
        scored[0].logprobs if scored else (),
    )
