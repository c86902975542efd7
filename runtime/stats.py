"""What an engine says of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..errors import NotNumbersError
from .request import Failed, Finished
from .scheduler import Scheduler


@dataclass(frozen=True)
class EngineStats:
    """A moment's view of the engine; what is counted never goes down.

    Attributes:
        waiting, running: requests.
        alive: whether requests are carried out.
        finished: requests by how they ended: stop, length, abort, or error.
        prompt_tokens: of requests that ended.
        completion_tokens: written so far.
        prefix_queries, prefix_hits: tokens of prompts that were looked for among those that are
            known, and those that were found.
        preemptions: sequences that had to start over for want of pages.
        not_numbers: requests that failed because the model computed no numbers.
        pages_used, pages: of keys and values.
        steps_by_tokens: steps, by how many tokens they computed.
    """

    waiting: int
    running: int
    alive: bool
    finished: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    not_numbers: int
    pages_used: int
    pages: int
    steps_by_tokens: dict[int, int]

    @property
    def requests_finished(self) -> int:
        """Requests that ended, however."""
        return sum(self.finished.values())


@dataclass
class Counts:
    """What the engine's thread counts."""

    finished: Counter[str] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    not_numbers: int = 0

    def add(self, end: Finished | Failed, looked_for: bool) -> None:
        """A request came to its end; `looked_for` says that its beginning was, among known ones."""
        if isinstance(end, Failed):
            self.finished["error"] += 1
            self.not_numbers += isinstance(end.error, NotNumbersError)
            return
        usage = end.usage
        self.finished[end.reason] += 1
        self.prompt_tokens += usage.prompt_tokens
        self.prefix_queries += usage.prompt_tokens if looked_for else 0
        self.prefix_hits += usage.cached_tokens

    def view(self, scheduler: Scheduler, arrived: int, alive: bool) -> EngineStats:
        """All of it at this moment; `arrived` requests are not in the queue yet."""
        pool = scheduler.pool
        return EngineStats(
            waiting=arrived + len(scheduler.waiting),
            running=len(scheduler.running),
            alive=alive,
            finished=dict(self.finished),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            preemptions=scheduler.preemptions,
            not_numbers=self.not_numbers,
            pages_used=pool.used,
            pages=pool.count,
            steps_by_tokens=dict(self.steps),
        )
