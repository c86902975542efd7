"""From scores to a token: greedy, or drawn after temperature, top-k, top-p, min-p in that order.

The order and the meaning of each are those of transformers' logits processors, the tests' oracle.
Before them come the biases and the penalties. Each answer has a sampler of its own, so its tokens
depend on no neighbour.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import NotNumbersError
from .draw import Draw
from .likeliest import not_below_kth
from .params import SamplingParams
from .request import Constraint

_LEAST_CHANCES = (1e-3, 1e-6)  # of the likeliest: what is above nearly always holds the nucleus
_BLOCK = 256


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int] = (),
        ends: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        """`ends` are the tokens that may not come before `min_tokens` are written."""
        self._params, self._constraint = params, constraint
        self._ends = np.fromiter(ends, np.int64)
        self._bias_at = np.array([token for token, _ in params.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._seen = set(prompt_ids) if params.repetition_penalty != 1 else set()
        self._written: Counter[int] = Counter()
        self._random = np.random.default_rng(None if params.seed is None else params.seed % 2**64)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the likeliest one by the model's own scores."""
        return self._params.greedy and not self._changes

    @property
    def needs_no_scores(self) -> bool:
        """Whether `draw` says all that there is to choosing the next token."""
        return not self._changes

    def draw(self) -> Draw:
        """How the next token is to be chosen, by whoever has the scores; `note` has to follow."""
        params = self._params
        if params.greedy:
            return Draw(0.0)
        return Draw(
            params.temperature, params.top_k, params.top_p, params.min_p, self._random.random()
        )

    def choose(self, scores: NDArray[np.float32]) -> int:
        """The next token, from scores [vocab], which stay as they are.

        Raises:
            NotNumbersError: the scores hold NaN, +inf, or nothing but -inf.
        """
        scores = self._changed(scores)
        best = int(scores.argmax())  # of a NaN, if there is one
        check_number(float(scores[best]))
        token = best if self._params.greedy else self._drawn(scores)
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """A token has been written."""
        self._written[token] += 1
        if self._constraint is not None:
            self._constraint.take(token)

    @property
    def _changes(self) -> bool:
        """Whether the model's scores are changed before the next choice."""
        params = self._params
        return bool(
            self._too_early
            or params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1
            or params.logit_bias
            or self._constraint is not None
        )

    @property
    def _too_early(self) -> bool:
        least = self._params.min_tokens  # asked first: counting takes time
        return least > 0 and len(self._ends) > 0 and self._written.total() < least

    def _changed(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """After biases, penalties, the least length and the constraint; a copy, if any is there."""
        params, written = self._params, self._written
        if not self._changes:
            return scores
        scores = scores.copy()
        scores[self._bias_at] += self._bias
        if params.repetition_penalty != 1:
            self._discourage_repetition(scores)
        at = np.fromiter(written, np.int64)
        times = np.fromiter(written.values(), np.float32)
        scores[at] -= times * params.frequency_penalty + params.presence_penalty
        if self._too_early:
            scores[self._ends] = -np.inf
        if self._constraint is not None:
            self._constraint.forbid(scores)
        return scores

    def _discourage_repetition(self, scores: NDArray[np.float32]) -> None:
        seen = np.fromiter(self._seen | self._written.keys(), np.int64)
        found, penalty = scores[seen], np.float32(self._params.repetition_penalty)
        scores[seen] = np.where(found > 0, found / penalty, found * penalty)

    def _drawn(self, scores: NDArray[np.float32]) -> int:
        tokens, chances = candidates(scores, self._params)
        at = _draw(chances, self._random.random())
        return at if tokens is None else int(tokens[at])


def check_number(best: float) -> None:
    """Raise NotNumbersError unless the greatest of some scores is a number."""
    if not math.isfinite(best):
        raise NotNumbersError("the model computed logits that are not numbers")


def candidates(
    scores: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """The tokens that may be drawn, None for all of them, and their chances up to a factor.

    `scores` fp32 [vocab] are finite or -inf, and one at least is finite.
    """
    tokens = None
    if 0 < params.top_k < len(scores):
        tokens = not_below_kth(scores, params.top_k)
        scores = scores[tokens]
    chances = np.exp((scores - scores.max()) / np.float32(params.temperature))
    for kept in (_nucleus, _likely_enough):
        at = kept(chances, params)
        if at is not None:
            tokens, chances = at if tokens is None else tokens[at], chances[at]
    return tokens, chances


def _nucleus(chances: NDArray[np.float32], params: SamplingParams) -> NDArray[np.int64] | None:
    """Indices of the smallest set of most likely tokens that reaches top-p; None for all."""
    if params.top_p >= 1:
        return None
    wanted = params.top_p * chances.sum(dtype=np.float64)
    for least in (*_LEAST_CHANCES, 0.0):
        likely = np.flatnonzero(chances >= np.float32(least))
        if chances[likely].sum(dtype=np.float64) >= wanted:
            break
    ordered = likely[np.argsort(-chances[likely], kind="stable")]
    sums = chances[ordered].cumsum(dtype=np.float64)
    kept: NDArray[np.int64] = ordered[sums - chances[ordered] < wanted]
    return kept


def _likely_enough(
    chances: NDArray[np.float32], params: SamplingParams
) -> NDArray[np.int64] | None:
    """Indices of those that min-p keeps; None for all."""
    if params.min_p == 0:
        return None
    return np.flatnonzero(chances >= np.float32(params.min_p) * chances.max())


def _draw(chances: NDArray[np.float32], drawn: float) -> int:
    """The index at which the running sum passes `drawn`, in [0, 1), of the whole sum.

    Sums of blocks first: running through a whole vocabulary would take several times as long.
    """
    sums = np.add.reduceat(chances, np.arange(0, len(chances), _BLOCK), dtype=np.float64)
    ends = sums.cumsum()
    wanted = drawn * ends[-1]
    # Rounding may lead behind the last block, or the last chance in it, that is not zero.
    block = min(int(ends.searchsorted(wanted, side="right")), int(sums.nonzero()[0][-1]))
    inside = chances[block * _BLOCK : (block + 1) * _BLOCK]
    rest = wanted - (ends[block] - sums[block])
    at = int(inside.cumsum(dtype=np.float64).searchsorted(rest, side="right"))
    return block * _BLOCK + min(at, int(inside.nonzero()[0][-1]))
