"""Several requests side by side: prompts alone, then tokens while all are being written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..runtime.model import Model
from .requests import Answered, carry_out
from .stats import Spread


@dataclass(frozen=True)
class BatchSample:
    """One repetition. `decode_tokens` of all requests came in `decode_s`, while all ran."""

    prefill_s: float
    decode_s: float
    decode_tokens: int


@dataclass(frozen=True)
class BatchBench:
    """So many requests at once; tokens of all together a second.

    `mbu` is the share of the measured read bandwidth at which the weights were read: once a step,
    whatever the batch. None where bytes or bandwidth are not known.
    """

    batch: int
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    mbu: float | None
    samples: tuple[BatchSample, ...]


def decode_length(batch: int, prompt_tokens: int, new_tokens: int, step_tokens: int) -> int:
    """Tokens of an answer, so that all of a batch are being written for `new_tokens` steps.

    Prompts are read `step_tokens` at a time, so the first requests write before the last begin.
    """
    return new_tokens + -(-batch * prompt_tokens // max(1, step_tokens - batch))


def one_batch(
    model: Model, prompt: tuple[int, ...], batch: int, new_tokens: int, step_tokens: int
) -> BatchSample | None:
    """One repetition; None where there is no room for all of them to run side by side."""
    prompts = [prompt] * batch
    read = carry_out(model, prompts, 1)
    prefill_s = max(answer.arrivals[0][0] for answer in read) - read[0].sent
    length = decode_length(batch, len(prompt), new_tokens, step_tokens)
    return _sample(prefill_s, carry_out(model, prompts, length))


def _sample(prefill_s: float, answers: Sequence[Answered]) -> BatchSample | None:
    """By the steps of the request that began last, until the first one ends."""
    last = max(answers, key=lambda answer: answer.arrivals[0][0])
    begin = last.arrivals[0][0]
    first_end = min(answer.arrivals[-1][0] for answer in answers)
    inside = [(at, count) for at, count in last.arrivals[1:] if begin < at <= first_end]
    if not inside:
        return None
    steps = sum(count for _, count in inside)
    return BatchSample(prefill_s, inside[-1][0] - begin, steps * len(answers))


def batch_row(
    samples: Sequence[BatchSample], batch: int, prompt_tokens: int, token_seconds: float | None
) -> BatchBench:
    """Summary of at least one repetition; `token_seconds` is what reading all weights takes."""
    decode = Spread.of([each.decode_tokens / each.decode_s for each in samples])
    return BatchBench(
        batch,
        Spread.of([batch * prompt_tokens / each.prefill_s for each in samples]),
        decode,
        None if token_seconds is None else decode.median / batch * token_seconds,
        tuple(samples),
    )
