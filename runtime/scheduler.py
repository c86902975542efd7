"""Who computes how many tokens in the next step. Knows pages and numbers, not models.

Answers that are being written come first, a token each; what is left of a step's tokens goes to
prompts, cut into pieces, so that a long one does not hold up the others. When pages run out, the
least urgent sequence gives up its own and starts over later: its tokens are known, so computing
them again leads to the same text.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from .paged import pages_for
from .pages import PagePool
from .sequence import Sequence


@dataclass(frozen=True)
class Work:
    """The next `count` tokens of a sequence, 1 or more."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether a new token can be chosen after it."""
        return self.count == self.sequence.rest


class Scheduler:
    """The queue and the running sequences. `waiting` is in order of urgency."""

    def __init__(self, pool: PagePool, max_running: int, tokens_per_step: int) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._max_running, self._tokens_per_step = max_running, tokens_per_step

    def add(self, sequence: Sequence) -> None:
        """Into the queue."""
        insort(self.waiting, sequence, key=lambda each: each.urgency)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, wherever it was; its pages are free."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        sequence.leave(self.pool)

    def plan(self) -> list[Work]:
        """Work for the next step, with pages for all of it; empty if there is nothing to do."""
        work: dict[Sequence, int] = {}
        left, before = self._tokens_per_step, self.preemptions
        for sequence in sorted(self.running, key=lambda each: (each.rest > 1, each.urgency)):
            count = min(sequence.rest, left)
            if count and sequence in self.running and self._find_room(sequence, count, work):
                work[sequence] = count
                left -= count
        # Whoever has just made room for others would only be in their way again.
        calm = self.preemptions == before
        while calm and left and self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if not self._begin(sequence):
                break
            work[sequence] = count = min(sequence.rest, left)
            left -= count
        return [Work(sequence, count) for sequence, count in work.items()]

    def _begin(self, sequence: Sequence) -> bool:
        """Take the first of the queue in, if there are pages for it and one more for each other."""
        sequence.take_known(self.pool)
        more = pages_for(sequence.length) - len(sequence.pages)
        found = self.pool.take(more) if more + len(self.running) <= self.pool.available else None
        if found is None:
            sequence.leave(self.pool)
            return False
        sequence.start(found)
        self.waiting.pop(0)
        self.running.append(sequence)
        return True

    def _find_room(self, sequence: Sequence, count: int, work: dict[Sequence, int]) -> bool:
        """Pages for `count` more tokens, if need be from the least urgent, which may be itself."""
        more = max(0, pages_for(sequence.computed + count) - len(sequence.pages))
        while (found := self.pool.take(more)) is None:
            victim = max(self.running, key=lambda each: each.urgency)
            self._preempt(victim)
            work.pop(victim, None)
            if victim is sequence:
                return False
        sequence.pages += found
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.leave(self.pool)
        self.add(sequence)
        self.preemptions += 1
