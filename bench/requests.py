"""Requests through a real engine, all sent at once, and when each of their tokens came."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import HalfweaveError
from ..runtime.engine import Engine
from ..runtime.engine_settings import EngineSettings
from ..runtime.model import Model
from ..runtime.params import SamplingParams
from ..runtime.request import Event, Failed, Finished, GenerationRequest, TextDelta, Timings


@dataclass
class Answered:
    """One request as its caller saw it: arrivals are (seconds of perf_counter, tokens)."""

    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    timings: Timings | None = None
    error: Exception | None = None
    tokens: int = 0


def carry_out(model: Model, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[Answered]:
    """Answer all prompts side by side, greedy, with the end token ignored.

    Each call has an engine of its own: two that live side by side slow each other (see threads).

    Raises:
        HalfweaveError: a request was not carried out to the end.
    """
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    answers = [Answered() for _ in prompts]
    left = threading.Semaphore(0)
    settings = EngineSettings(max_running=len(prompts), share_prefixes=False)
    with Engine(model, settings) as engine:
        sent = time.perf_counter()
        engine.submit_all(
            [
                (GenerationRequest(str(number), prompt, params), _Collector(answer, left))
                for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
        )
        for _ in prompts:
            left.acquire()
    for answer in answers:
        answer.sent = sent
        if answer.error is not None:
            raise answer.error
        if answer.tokens != new_tokens:
            raise HalfweaveError(
                f"{model.name} wrote {answer.tokens} tokens of {new_tokens}: nothing to measure"
            )
    return answers


@dataclass(frozen=True)
class _Collector:
    """What the engine's thread calls for every event of one request."""

    answer: Answered
    left: threading.Semaphore

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, TextDelta):
            if event.token_ids:
                self.answer.arrivals.append((now, len(event.token_ids)))
            return
        if isinstance(event, Failed):
            self.answer.error = event.error
        elif isinstance(event, Finished):
            self.answer.timings = event.timings
            self.answer.tokens = event.usage.completion_tokens
        self.left.release()
