"""A run of several steps: formats under a budget, the pass over the blocks, distillation.

What one step leaves for the next lies in a directory inside the output; the journal of the output
itself says that it is unfinished, and under which key. Each step is resumable in its own right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from ..files import read_json, write_json, write_text
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from .budget.check import BudgetCheck, check_budget
from .budget.choose import BudgetPlan, BudgetProgress, choose_formats
from .budget.windows import BudgetWindows, cut_windows
from .calibrate import CalibrationText
from .card import BUDGET_HEADING, budget_section
from .journal import Journal
from .oneshot import OneShot, OneShotResult, Progress, Sample, draw_sample
from .outdir import STEPS_DIRECTORY, publish, tidy
from .plan import Plan, make_plan
from .recipe import Recipe
from .recover.distill import check as check_distillation
from .recover.distill import distill
from .recover.settings import Distillation, DistillProgress, DistillResult
from .source import Source, token_ids
from .staged import StagedRecovery, check_steps

# What a run tells: a budget's plan once, when it is made, and progress of every step.
ProgressEvent = Progress | BudgetProgress | BudgetPlan | DistillProgress
ProgressCallback = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class StepsResult:
    """What each step did; `recovery` and `budget` are None where there was no such step.

    `recovery_seconds` are what this process spent on training and on what that called for.
    """

    plan: Plan
    pruned: OneShotResult
    recovery_seconds: float
    recovery: DistillResult | None = None
    budget: BudgetCheck | None = None


class InSteps:
    """One run with a budget, or with distillation."""

    def __init__(
        self,
        source: Source,
        directory: Path,
        recipe: Recipe,
        text: CalibrationText,
        progress: ProgressCallback | None,
    ) -> None:
        """Write nothing yet, but check all that can be told from the inputs.

        Raises:
            UsageError: the text, or the distillation, is too short.
            CheckpointError: the model has no usable tokenizer.
            CapacityError: the distillation does not fit in memory.
        """
        self._source, self._directory, self._recipe = source, directory, recipe
        self._text, self._progress = text, progress
        self._steps = directory / STEPS_DIRECTORY
        self._pruned = self._steps / "pruned"
        if recipe.distills:
            if recipe.is_rounded_on_the_way:
                check_steps(source, self._distillation)
            check_distillation(source, text.text, self._distillation)
        self._sample = self._draw()

    def go(self, resume: bool) -> StepsResult:
        """Do what is left to do.

        Raises:
            RefusedError: the directory belongs to another run.
            UsageError, CheckpointError, CapacityError, HalfweaveError: as `prune`.
        """
        distills = self._recipe.distills
        key = self._one_shot(self._recipe, self._directory).key
        again = resume and (self._directory / JOURNAL_FILE).exists()
        journal = (Journal.resume if again else Journal.begin)(self._directory, key)
        self._steps.mkdir(exist_ok=True)
        manifest = self._directory / MANIFEST_FILE
        recovery, training_seconds = None, 0.0
        if manifest.exists():  # complete already, if the run was killed while it tidied up
            recipe = Recipe.read(manifest)
            pruned = self._one_shot(recipe, self._directory).result()
            if distills:
                record = read_json(manifest)["provenance"]["recovery"]
                recovery = DistillResult.of_record(self._directory, record)
        else:
            formats = self._formats() if self._recipe.has_budget else None
            recipe = replace(self._recipe, choices=formats.choices) if formats else self._recipe
            # Codes come after the training, from weights that were trained as floats.
            first = replace(recipe, bits=16) if recipe.is_rounded_on_the_way else recipe
            pruned = self._prune(first)
            if formats:
                self._check(formats)
            if distills:
                started = time.perf_counter()
                recovery = self._distill()
                training_seconds = time.perf_counter() - started
            else:
                publish(self._pruned)
        tidy(self._directory)
        journal.remove()
        made = self._one_shot(recipe, self._directory).result()
        pruned = replace(pruned, linears=made.linears)
        seconds = pruned.tuning_seconds + training_seconds
        plan = make_plan(self._source, recipe)
        return StepsResult(plan, pruned, seconds, recovery, _outcome(self._directory))

    def _prune(self, recipe: Recipe) -> OneShotResult:
        return self._one_shot(recipe, self._pruned).ensure()

    @cached_property
    def _windows(self) -> BudgetWindows:
        return cut_windows(token_ids(self._source, self._text.text), self._recipe)

    def _draw(self) -> Sample:
        """A budget's model is fitted to the budget's own windows, to keep the judging ones out."""
        if self._recipe.is_for_budget:
            return Sample(self._text, self._windows.fit)
        return draw_sample(self._source, self._text, self._recipe)

    @property
    def _distillation(self) -> Distillation:
        recipe = self._recipe
        return Distillation(
            minutes=recipe.recover_minutes,
            tokens=recipe.recover_tokens,
            precision=recipe.recover_precision,
            learning_rate=recipe.recover_rate,
            ce=recipe.recover_ce,
            seed=recipe.seed,
        )

    def _one_shot(self, recipe: Recipe, directory: Path) -> OneShot:
        plan = make_plan(self._source, recipe.by_blocks)
        return OneShot(self._source, directory, recipe, plan, self._sample, self._progress)

    def _formats(self) -> BudgetPlan:
        scratch = self._steps / "budget"
        scratch.mkdir(exist_ok=True)
        plan = choose_formats(self._source, self._recipe, self._windows, scratch, self._progress)
        if self._progress is not None:
            self._progress(plan)
        return plan

    def _distill(self) -> DistillResult:
        if self._recipe.is_rounded_on_the_way:
            staged = StagedRecovery(
                source=self._source,
                student=self._pruned,
                out=self._directory,
                work=self._steps,
                recipe=self._recipe,
                settings=self._distillation,
                sample=self._sample,
                progress=self._progress,
            )
            return staged.go()
        return distill(
            self._pruned,
            self._source,
            self._directory,
            self._text.text,
            self._distillation,
            resume=True,
            progress=self._progress,
        )

    def _check(self, formats: BudgetPlan) -> None:
        """Measure the finished model, and write the outcome into its manifest, once."""
        if _outcome(self._pruned) is not None:
            return  # and some of its files may have been moved
        losses = list(formats.dense_losses)
        found = check_budget(self._pruned, self._source, self._recipe, self._windows.judge, losses)
        card = self._pruned / "README.md"
        write_text(card, card.read_text().partition(BUDGET_HEADING)[0] + budget_section(found))
        manifest = read_json(self._pruned / MANIFEST_FILE)
        manifest["provenance"]["budget"] = asdict(found)
        write_json(self._pruned / MANIFEST_FILE, manifest)


def _outcome(directory: Path) -> BudgetCheck | None:
    """What a finished model's manifest says of its budget."""
    found = read_json(directory / MANIFEST_FILE)["provenance"].get("budget")
    return None if found is None else BudgetCheck(**found)
