"""What is noted of one HTTP request while it is answered: one line of the log, never any text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.types import Scope

from ..runtime.request import Finished

_KEY = "halfweave.record"


@dataclass
class Record:
    """Figures of a request's answers, summed; times are the longest of them, in milliseconds."""

    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    finish: Counter[str] = field(default_factory=Counter)

    def add(self, end: Finished) -> None:
        """One answer came to its end."""
        self.prompt_tokens += end.usage.prompt_tokens
        self.cached_tokens += end.usage.cached_tokens
        self.completion_tokens += end.usage.completion_tokens
        self.queue_ms = max(self.queue_ms, end.timings.queue_ms)
        self.ttft_ms = max(self.ttft_ms, end.timings.queue_ms + end.timings.prefill_ms)
        self.finish[end.reason] += 1

    def line(self) -> dict[str, Any]:
        """What is known, for the log; nothing where no model was asked."""
        if self.model is None:
            return {}
        return {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_ms": round(self.queue_ms, 1),
            "ttft_ms": round(self.ttft_ms, 1),
            "finish": dict(self.finish),
        }


def begin_record(scope: Scope) -> Record:
    """A new record for a request."""
    record = Record()
    scope.setdefault("state", {})[_KEY] = record
    return record


def record_of(scope: Scope) -> Record:
    """The record of a request that has begun."""
    return cast(Record, scope["state"][_KEY])
