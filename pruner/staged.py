"""Recovery of a model that ends in 4-bit codes: train, then round some blocks, then train the rest.

Codes move in jumps, and a training step that would move one by a tenth of a code does nothing. So
the weights are trained as floats first, on their masks. Then the blocks are rounded in a few parts,
from the first block to the last, with the solver of the pruner, towards the outputs of the trained
model, which may move 2:4 masks; behind each part all that is still floats trains on, and mends what
was rounded away (cf. INQ, Zhou et al., 1702.03044, which rounds weights in parts). Each step leaves
a complete checkpoint in a directory of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_json
from ..kernels.schema import MANIFEST_FILE
from ..runtime.checkpoint import Checkpoint
from .oneshot import OneShot, Progress, Sample
from .plan import make_plan
from .recipe import Recipe
from .recover.distill import Link, distill
from .recover.settings import (
    ROUNDING_PARTS,
    ROUNDING_TOKENS,
    TIMED_STEPS,
    Distillation,
    DistillProgress,
    DistillResult,
)
from .source import Source, Trained

# Hundredths of all steps behind a part's rounding, and behind the last, when codes alone are left.
_BETWEEN, _LAST = 12, 6
_TURN = 0.4  # share of the rates at which the training as floats ends; from there they fall evenly
_CODES_RATE = 0.1  # of the floats' rates: at the full ones codes get worse (docs/pruning.md)


@dataclass(frozen=True)
class StagedRecovery:
    """One run: `student` (16 bits, pruned from `source`) becomes codes by `recipe` in `out`.

    `work` is for what only the next step needs. Some of `sample` calibrates the rounding.
    """

    source: Source
    student: Path
    out: Path
    work: Path
    recipe: Recipe
    settings: Distillation
    sample: Sample
    progress: Callable[[Progress | DistillProgress], None] | None

    def go(self) -> DistillResult:
        """Do what is left to do, and tell of all of it.

        Raises as `distill`, `prune` and `check_steps` do.
        """
        check_steps(self.source, self.settings)
        done = [number for number in range(self._parts) if self._is_done(number)]
        if done:  # by an earlier process
            result = DistillResult.of_record(self._place(done[-1]), self._record(done[-1]))
        else:
            result = self._train(0, self.student, self._split.settings(0))
        for number in range(max(done, default=0) + 1, self._parts + 1):
            result = self._part(number).behind(result)
        return result

    @cached_property
    def _split(self) -> Split:
        return Split(_fitted(self.source, self.settings), parts_of(self.source, self.settings))

    @property
    def _parts(self) -> int:
        return self._split.parts

    def _part(self, number: int) -> DistillResult:
        """Round a part of the blocks, counted from 1, and train what is left."""
        before, rounded = self._place(number - 1), self.work / f"rounded-{number}"
        self._round(before, rounded, number - 1)
        floats = _first(self._record(number - 1))
        settings = self._split.settings(number, floats["tokens"])
        settings = replace(settings, precision=floats["settings"]["precision"])
        result = self._train(number, rounded, settings, before)
        for directory in (rounded, before):
            shutil.rmtree(directory)
        return result

    def _place(self, number: int) -> Path:
        """Where the model is when so many parts are rounded."""
        return self.out if number == self._parts else self.work / f"trained-{number}"

    def _is_done(self, number: int) -> bool:
        return (self._place(number) / MANIFEST_FILE).exists()

    def _record(self, number: int) -> Mapping[str, Any]:
        manifest = read_json(self._place(number) / MANIFEST_FILE)
        record: Mapping[str, Any] = manifest["provenance"]["recovery"]
        return record

    def _train(
        self, number: int, student: Path, settings: Distillation, before: Path | None = None
    ) -> DistillResult:
        out = self._place(number)
        out.mkdir(exist_ok=True)
        return distill(
            student,
            self.source,
            out,
            self.sample.text.text,
            settings,
            link=Link(before, goes_on=number < self._parts),
            resume=True,
            progress=self.progress,
        )

    def _round(self, floats: Path, out: Path, part: int) -> None:
        out.mkdir(exist_ok=True)
        source = Trained.of(self.source, Checkpoint.open(floats))
        plan = make_plan(self.source, replace(self.recipe, recover="none"))
        count = self.source.block_count
        blocks = range(part * count // self._parts, (part + 1) * count // self._parts)
        OneShot(source, out, self.recipe, plan, self._few, self.progress, blocks).ensure()

    @property
    def _few(self) -> Sample:
        """The end of the sample, where the windows are that blocks were not fitted to."""
        windows = self.sample.windows
        count = max(1, ROUNDING_TOKENS // windows.shape[1])
        return replace(self.sample, windows=windows[-count:])


def parts_of(source: Source, settings: Distillation) -> int:
    """In how many parts the blocks are rounded: each has a block, and a step behind it."""
    steps = settings.tokens // _fitted(source, settings).batch_tokens
    most = min(ROUNDING_PARTS, source.block_count)
    return max(1, min(most, steps - 1)) if settings.tokens else most


def check_steps(source: Source, settings: Distillation) -> None:
    """Refuse a number of tokens that leaves nothing for one of two trainings.

    Raises:
        UsageError: it is less than two steps.
    """
    step = _fitted(source, settings).batch_tokens
    if settings.tokens and settings.tokens < 2 * step:
        raise UsageError(
            f"recovery: {settings.tokens} tokens are one step of {step}, and what ends in codes is "
            "trained before and after it is rounded",
            f"give {2 * step} tokens or more",
        )


@dataclass(frozen=True)
class Split:
    """How the steps of `settings`, which fit the model, are shared out among the trainings."""

    whole: Distillation
    parts: int

    def settings(self, number: int, floats_tokens: int = 0) -> Distillation:
        """Of the training as floats (0), or of that behind a part, which are counted from 1.

        A training by the clock takes a share of the minutes as floats. What is behind it,
        `floats_tokens` being known, takes as many steps as make the whole a number that would be
        shared out in the same way, so that a recipe with that number gives the same bytes.
        """
        high, low = self._rate(number - 1) if number else 1.0, self._rate(number)
        shared = self._rates(high, low / high, codes=number > 0)
        if not number and not self.whole.tokens:
            behind = _BETWEEN * (self.parts - 1) + _LAST
            return replace(shared, minutes=self.whole.minutes * (1 - behind / 100))
        steps = self._steps(floats_tokens)[number]
        return replace(shared, tokens=steps * self.whole.batch_tokens)

    def _steps(self, floats_tokens: int = 0) -> list[int]:
        """Of each training, the one as floats first; at least one each."""
        step = self.whole.batch_tokens
        if self.whole.tokens:
            return self._shared(self.whole.tokens // step)
        total = floats_tokens // step + self.parts
        while self._shared(total)[0] < floats_tokens // step:  # it grows by one at most
            total += 1
        return self._shared(total)

    def _shared(self, total: int) -> list[int]:
        shares = [_BETWEEN] * (self.parts - 1) + [_LAST]
        behind = [max(1, total * share // 100) for share in shares]
        return [total - sum(behind), *behind]

    def _rate(self, rounded: int) -> float:
        """Share of the rates when so many parts have been rounded and trained behind."""
        last = self.whole.final_rate
        return _TURN + (last - _TURN) * rounded / self.parts if last < _TURN else last

    def _rates(self, high: float, final: float, codes: bool) -> Distillation:
        whole, of_codes = self.whole, high * (_CODES_RATE if codes else 1)
        return replace(
            whole,
            learning_rate=high * whole.learning_rate,
            gain_rate=high * whole.gain_rate,
            scale_rate=of_codes * whole.scale_rate,
            warmup_steps=TIMED_STEPS if codes else whole.warmup_steps,
            curve_points=0 if codes else whole.curve_points,  # its beginning and end are measured
            code_share=_CODES_RATE if codes else 1.0,
            final_rate=final,
        )


def _first(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of several trainings, one behind the other, the record of the one as floats."""
    while "before_rounding" in record:
        record = record["before_rounding"]
    return record


def _fitted(source: Source, settings: Distillation) -> Distillation:
    return settings.fitted(source.family.context)
