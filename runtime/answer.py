"""The answer to one request as it grows: its tokens, its text, and its end. Knows no model."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .draw import Draw
from .likeliest import logprob_of
from .request import FinishReason, GenerationRequest, TextDelta, TokenLogprob
from .sampler import Sampler, check_number
from .stops import StopFinder
from .tokenizer import Tokenizer

Show = Callable[[TextDelta], None]


class Answer:
    """Grows by one token for every call of `take`, until that gives a reason to stop."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer, limit: int) -> None:
        """`limit` is the most tokens it may have."""
        params = request.params
        ends = set(params.stop_token_ids)
        if not params.ignore_eos or request.constraint is not None:
            ends |= tokenizer.eos_ids  # a constraint that is met leaves nothing else to write
        self._params, self._ends, self.limit = params, ends, limit
        # A form may be met before the least length is; then there is nothing else to write.
        held_back = () if request.constraint is not None else ends
        self._sampler = Sampler(params, request.prompt_ids, held_back, request.constraint)
        before = request.prompt_ids if request.goes_on else ()
        self._text = tokenizer.stream(params.skip_special_tokens, before)
        self._stops = StopFinder(params.stop, params.include_stop)
        self.token_ids: list[int] = []
        self.first_token_at: float | None = None

    def take(self, scores: NDArray[np.float32], show: Show) -> FinishReason | None:
        """Choose a token from scores [vocab]; shows what became certain; a reason at the end.

        Raises:
            NotNumbersError: the scores are not numbers.
        """
        token = self._sampler.choose(scores)
        asked = self._params.logprobs
        return self._add(token, () if asked is None else (logprob_of(scores, token, asked),), show)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the likeliest token, given to `take_chosen`, would do in place of `take`."""
        return self._sampler.takes_likeliest and self._params.logprobs is None

    @property
    def needs_no_scores(self) -> bool:
        """Whether a token drawn by `draw` would do in place of `take`."""
        return self._sampler.needs_no_scores and self._params.logprobs is None

    def draw(self) -> Draw:
        """How the next token is to be chosen where the scores are; `take_chosen` has to follow."""
        return self._sampler.draw()

    def take_chosen(self, token: int, score: float, show: Show) -> FinishReason | None:
        """As `take`, where the token and the greatest score are known already."""
        check_number(score)
        self._sampler.note(token)
        return self._add(token, (), show)

    def _add(
        self, token: int, logprobs: tuple[TokenLogprob, ...], show: Show
    ) -> FinishReason | None:
        self.token_ids.append(token)
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        if token in self._ends:
            kept = self._text.push(token) if self._params.include_stop else ""
            self._finish(kept, show, (token,), logprobs)
            return "stop"
        text = self._text.push(token)
        if len(self.token_ids) >= self.limit:
            self._finish(text, show, (token,), logprobs)
            return "stop" if self._stops.found else "length"
        show(TextDelta(self._checked(text), (token,), logprobs))
        return "stop" if self._stops.found else None

    def _checked(self, text: str) -> str:
        """What may be shown of it now. No stop string counts before the least length."""
        return text if len(self.token_ids) < self._params.min_tokens else self._stops.push(text)

    def _finish(
        self, text: str, show: Show, token: tuple[int], logprobs: tuple[TokenLogprob, ...]
    ) -> None:
        """The last token: what was held back is certain now."""
        text = self._stops.push(text + self._text.finish())
        if not self._stops.found:
            text += self._stops.finish()
        show(TextDelta(text, token, logprobs))
