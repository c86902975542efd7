"""A request on its way through the engine: what is computed of it, and where that is kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..kernels.paging import PAGE_POSITIONS
from .answer import Answer
from .paged import Part
from .pages import PagePool, root_digest
from .request import Event, GenerationRequest, TokenLogprob

Emit = Callable[[Event], None]

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Sequence:
    """One request, its answer so far, and its pages.

    Attributes:
        order: number of its arrival.
        aborted: it is to end at the next step.
        pages: where its keys and values are; empty while it waits.
        computed: positions whose keys and values are there.
        cached: those of them that another request had computed.
        scored: log-probabilities of the prompt's tokens, all but the first, as far as known.
        started_at: when it was first taken from the queue, on the monotonic clock.
    """

    request: GenerationRequest
    emit: Emit
    answer: Answer
    order: int = 0
    submitted_at: float = field(default_factory=time.monotonic)
    aborted: bool = False
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    scored: list[TokenLogprob] = field(default_factory=list)
    started_at: float | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt_ids) + len(self.answer.token_ids)

    @property
    def rest(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while the answer is written."""
        return self.length - self.computed

    @property
    def urgency(self) -> tuple[int, int]:
        """The least goes first."""
        return self.request.priority, self.order

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens of prompt and answer at some positions."""
        prompt = self.request.prompt_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        written = self.answer.token_ids
        return (
            *prompt[start:],
            *written[max(0, start - len(prompt)) : stop - len(prompt)],
        )

    def tell(self, event: Event) -> None:
        """Pass an event on; a receiver that raises ends its own request, and nothing else."""
        try:
            self.emit(event)
        except BaseException:  # a cancelled future's error is one, and concerns this request alone
            _log.exception("the receiver of request %s raised", self.request.id)
            self.aborted = True

    def take_known(self, pool: PagePool) -> None:
        """Take the pages of a beginning that is known already.

        Log-probabilities of a prompt take its hidden states, so then nothing is left out.
        """
        salt = self.request.salt
        if self.request.params.prompt_logprobs is None:
            self.pages, self.digests = pool.find(self.tokens(0, self.length), salt)
        else:
            self.pages, self.digests = [], [root_digest(salt)]
        self.computed = len(self.pages) * PAGE_POSITIONS

    def start(self, pages: list[int]) -> None:
        """It runs from now on; `pages` are for what is left of it."""
        if self.started_at is None:
            self.started_at = time.monotonic()
            self.cached = self.computed
        self.pages += pages

    def leave(self, pool: PagePool) -> None:
        """Give all pages back; whatever was computed will have to be found or computed again."""
        pool.release(self.pages)
        self.pages, self.digests, self.computed = [], [], 0

    def part(self, count: int) -> Part:
        """The next `count` tokens to compute."""
        stop = self.computed + count
        return Part(self.tokens(self.computed, stop), self.computed, self.pages)

    def advance(self, count: int, pool: PagePool) -> None:
        """So many more are computed; pages that are full now can be found by others."""
        self.computed += count
        for page in range(len(self.digests) - 1, self.computed // PAGE_POSITIONS):
            first = page * PAGE_POSITIONS
            tokens = self.tokens(first, first + PAGE_POSITIONS)
            self.digests.append(pool.publish(self.pages[page], self.digests[-1], tokens))
