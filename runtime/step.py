"""One step of the engine: planned work goes through the model, and each answer takes its token.

What goes wrong with one sequence stays with it; see `StepResult`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .likeliest import logprob_of
from .model import Model
from .paged import Memory
from .request import FinishReason, PromptScored
from .sampler import check_number
from .scheduler import Work
from .sequence import Sequence

_ROWS_SCORED = 64  # of a prompt at a time: bounds the [rows, vocab] buffer


@dataclass
class StepResult:
    """What came of a step: who is done and why, and who failed. All others go on.

    `written` tokens were added to answers.
    """

    written: int = 0
    finished: dict[Sequence, FinishReason] = field(default_factory=dict)
    failed: dict[Sequence, Exception] = field(default_factory=dict)

    def add(self, sequence: Sequence, reason: FinishReason | None) -> None:
        """A token was written; with a reason if it was the last."""
        self.written += 1
        if reason is not None:
            self.finished[sequence] = reason

    @contextmanager
    def blaming(self, sequence: Sequence) -> Iterator[None]:
        """An exception inside is this sequence's failure."""
        try:
            yield
        except Exception as error:
            self.failed[sequence] = error


@dataclass(frozen=True)
class Stepper:
    """Runs steps on a model; `memory` holds the pages."""

    model: Model
    memory: Memory

    def run(self, work: Seq[Work]) -> StepResult:
        """Compute all work at once; the caller advances the sequences that did not fail."""
        result = StepResult()
        states = self._states(work, result)
        for each in work:
            if each.sequence in states:
                with result.blaming(each.sequence):
                    self._score_prompt(each, states[each.sequence])
        complete = [
            each.sequence
            for each in work
            if each.completes and each.sequence in states and each.sequence not in result.failed
        ]
        self._take_tokens(complete, states, result)
        return result

    def _take_tokens(
        self, complete: Seq[Sequence], states: Mapping[Sequence, Tensor], result: StepResult
    ) -> None:
        """A token for each answer that has room for one; scores are fetched only if needed."""
        writing = [sequence for sequence in complete if sequence.answer.limit > 0]
        result.finished |= {each: "length" for each in complete if each.answer.limit == 0}
        if not writing:
            return
        last = {sequence: states[sequence][-1] for sequence in writing}
        decoder = self.model.decoder
        if all(sequence.answer.takes_likeliest for sequence in writing):
            _add_chosen(decoder.likeliest(_stacked(last, writing)), writing, result)
            return
        if decoder.draws:
            drawn = [sequence for sequence in writing if sequence.answer.needs_no_scores]
            if drawn:
                draws = [sequence.answer.draw() for sequence in drawn]
                _add_chosen(decoder.drawn(_stacked(last, drawn), draws), drawn, result)
            writing = [sequence for sequence in writing if sequence not in drawn]
        if not writing:
            return
        rows = decoder.logits(_stacked(last, writing)).numpy()
        for sequence, scores in zip(writing, rows, strict=True):
            with result.blaming(sequence):
                result.add(sequence, sequence.answer.take(scores, sequence.tell))

    def _states(self, work: Seq[Work], result: StepResult) -> dict[Sequence, Tensor]:
        """Final hidden states [count, hidden] of each sequence.

        If the batch raises, each is tried alone: that writes the same keys and values again, and
        shows whose fault it was.
        """
        parts = [each.sequence.part(each.count) for each in work]
        try:
            hidden = self.model.decoder.run(parts, self.memory)
        except Exception as error:
            if len(work) == 1:
                result.failed[work[0].sequence] = error
                return {}
            states: dict[Sequence, Tensor] = {}
            for each in work:
                states |= self._states([each], result)
            return states
        split = hidden.split([each.count for each in work])
        return {each.sequence: rows for each, rows in zip(work, split, strict=True)}

    def _score_prompt(self, work: Work, states: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that these states predict, if asked for."""
        sequence, prompt = work.sequence, work.sequence.request.prompt_ids
        top = sequence.request.params.prompt_logprobs
        if top is None:
            return
        # The state at position p predicts token p + 1; entry i of `scored` is token i + 1.
        first = len(sequence.scored) - sequence.computed
        last = min(work.count, len(prompt) - 1 - sequence.computed)
        for start in range(max(0, first), last, _ROWS_SCORED):
            stop = min(start + _ROWS_SCORED, last)
            rows = self.model.decoder.logits(states[start:stop]).numpy()
            for offset, scores in enumerate(rows, start=sequence.computed + start + 1):
                check_number(float(scores.max()))
                sequence.scored.append(logprob_of(scores, prompt[offset], top))
        if work.completes and not sequence.answer.token_ids:
            sequence.tell(PromptScored(tuple(sequence.scored)))


def _stacked(last: Mapping[Sequence, Tensor], some: Seq[Sequence]) -> Tensor:
    return torch.stack([last[sequence] for sequence in some])


def _add_chosen(chosen: tuple[Tensor, Tensor], writing: Seq[Sequence], result: StepResult) -> None:
    """Give each answer its token; a greatest score that is no number is its failure."""
    tokens, best = (each.tolist() for each in chosen)
    for sequence, token, score in zip(writing, tokens, best, strict=True):
        with result.blaming(sequence):
            result.add(sequence, sequence.answer.take_chosen(token, score, sequence.tell))
