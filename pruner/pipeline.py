"""The whole job, from a recipe to a complete directory: one pass, then recovery if asked for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from .calibrate import CalibrationText, load_text
from .journal import Journal, LinearRecord, locked
from .oneshot import OneShot, OneShotResult, Progress
from .outdir import STEPS_DIRECTORY, prepare_directory, settle
from .plan import Plan, check_capacity, make_plan
from .recipe import Recipe
from .recover.distill import distill
from .recover.memory import check_memory, needed_bytes
from .recover.settings import Distillation, DistillProgress, DistillResult
from .source import Source

ProgressCallback = Callable[[Progress | DistillProgress], None]


@dataclass(frozen=True)
class PruneResult:
    """A complete output directory and what it took. `linears` is in the model's order.

    `recovery` is what whole-model distillation did, where the recipe asked for it.
    """

    path: Path
    plan: Plan
    linears: Mapping[str, LinearRecord]
    seconds: float
    resumed_blocks: int
    recovery: DistillResult | None = None


def plan_prune(model: str | Path, recipe: Recipe) -> Plan:
    """What `prune` would do, without doing it (`--dry-run`). Raises as `prune` does."""
    return make_plan(Source.open(model), recipe)


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> PruneResult:
    """Prune the dense model in `model` into the directory `out`.

    `out` is complete when its manifest is there. Killed at any instant, the same call with
    `resume=True` yields the same bytes (same recipe, library versions and thread count).

    Raises:
        UsageError: bad paths, recipe, or calibration text.
        RefusedError: `out` is taken, locked, or belongs to another run; or the model is unsafe.
        CheckpointError: the model is damaged; NaN and infinity count unless allowed.
        CapacityError: the run does not fit in memory or on the disk.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    source = Source.open(model)
    job = _Job(source, recipe, make_plan(source, recipe), load_text(recipe.calib), progress)
    directory = prepare_directory(source, Path(out), resume, overwrite)
    with locked(directory):
        settle(directory, overwrite)
        check_capacity(job.plan, directory)
        distills = recipe.recover == "distill"
        result, recovery = (
            _prune_and_distill(job, directory, resume)
            if distills
            else (job.one_shot(directory).go(resume), None)
        )
    seconds = time.perf_counter() - started
    return PruneResult(
        directory, job.plan, result.linears, seconds, result.resumed_blocks, recovery
    )


@dataclass(frozen=True)
class _Job:
    """What is asked for, and of what."""

    source: Source
    recipe: Recipe
    plan: Plan
    text: CalibrationText
    progress: ProgressCallback | None

    def one_shot(self, directory: Path) -> OneShot:
        """The pass over the blocks, into `directory`."""
        return OneShot(self.source, directory, self.recipe, self.plan, self.text, self.progress)


def _prune_and_distill(
    job: _Job, directory: Path, resume: bool
) -> tuple[OneShotResult, DistillResult | None]:
    """One pass into a directory inside, then distillation from there into `directory`.

    The outer journal says that the directory is unfinished, and under which key.
    """
    steps = directory / STEPS_DIRECTORY
    one_shot, settings = job.one_shot(steps / "pruned"), _distillation(job.recipe)
    check_memory(needed_bytes(job.source, settings, 0))
    again = resume and (directory / JOURNAL_FILE).exists()
    journal = (Journal.resume if again else Journal.begin)(directory, one_shot.key)
    recovery = None
    if again and (directory / MANIFEST_FILE).exists():  # killed while tidying up
        pruned = job.one_shot(directory).finished()
    else:
        (steps / "pruned").mkdir(parents=True, exist_ok=True)
        pruned = one_shot.finished() or one_shot.go(resume=True)
        recovery = distill(
            steps / "pruned",
            job.source.path,
            directory,
            job.text.text,
            settings,
            resume=True,
            progress=job.progress,
        )
    assert pruned is not None
    shutil.rmtree(steps, ignore_errors=True)
    journal.remove()
    return pruned, recovery


def _distillation(recipe: Recipe) -> Distillation:
    return Distillation(
        minutes=recipe.recover_minutes, tokens=recipe.recover_tokens, seed=recipe.seed
    )
