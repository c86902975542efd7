"""The whole job, from a recipe to a complete directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from ..kernels.schema import JOURNAL_FILE
from .budget.check import BudgetCheck
from .budget.choose import check_reachable
from .calibrate import CalibrationText, load_text
from .device import explained_memory
from .journal import LinearRecord, locked
from .oneshot import OneShot, draw_sample
from .outdir import held_bytes, prepare_directory, settle
from .plan import Plan, check_capacity, make_plan
from .recipe import Recipe
from .recover.settings import DistillResult
from .source import Source
from .steps import InSteps, ProgressCallback, StepsResult
from .tasks import Tasks


@dataclass(frozen=True)
class PruneResult:
    """A complete output directory and what it took. `linears` is in the model's order.

    `recovery` is what whole-model distillation did, and `budget` what the finished checkpoint
    measures on text that nothing was fitted to, each where the recipe asked for it. Of `seconds`,
    `recovery_seconds` went into training, of blocks and of the whole, with all its measurements and
    roundings; None where an earlier process did some of the run.
    """

    path: Path
    plan: Plan
    linears: Mapping[str, LinearRecord]
    seconds: float
    recovery_seconds: float | None
    resumed_blocks: int
    recovery: DistillResult | None = None
    budget: BudgetCheck | None = None


def plan_prune(model: str | Path, recipe: Recipe, device: str = "cpu") -> Plan:
    """What `prune` would do, without doing it (`--dry-run`).

    Raises what `prune` raises of the model and the recipe.
    """
    return _planned(Source.open(model, device), recipe)


def rehearse(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    ray: str | None = None,
) -> Plan:
    """The plan of a run, and all that can refuse it before its work but the room for it.

    Leaves `out` as it is; raises as `prune` does. With `ray` "local" a Ray is started for it.
    """
    recipe = recipe or Recipe()
    source = Source.open(model, device)
    plan = _planned(source, recipe)
    text = load_text(recipe.calib)
    with explained_memory(), _tasks(ray, source) as tasks:
        _ready(replace(source, tasks=tasks), Path(out), recipe, plan, text, None)
    return plan


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    ray: str | None = None,
    progress: ProgressCallback | None = None,
) -> PruneResult:
    """Prune the dense model in `model` into the directory `out`.

    `out` is complete when its manifest is there. Killed at any instant, the same call with
    `resume=True` yields the same bytes (same recipe, library versions, device and thread count).
    `device`, cpu, cuda or cuda:N, is where blocks are worked on. `ray`, "local", "auto" or the
    address of a cluster, has the workers of a Ray solve the linears and sum the Hessians.

    Raises:
        UsageError: bad paths, recipe, calibration text, or device; both `resume` and `overwrite`;
            no such Ray, or a GPU beside it.
        RefusedError: `out` is taken, locked, or belongs to another run; or the model is unsafe.
        CheckpointError: the model is damaged; NaN and infinity count unless allowed.
        CapacityError: the run does not fit in memory or on the disk.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    source = Source.open(model, device)
    plan = _planned(source, recipe)
    text = load_text(recipe.calib)
    directory = prepare_directory(source.path, Path(out), resume, overwrite)
    with locked(directory), explained_memory(), _tasks(ray, source) as tasks:
        # All that can refuse the run comes before the one call that may remove a finished model.
        check_capacity(plan, directory, held_bytes(directory))
        source = replace(source, tasks=tasks)
        go = _ready(source, directory, recipe, plan, text, progress)
        settle(directory, overwrite)
        again = resume and (directory / JOURNAL_FILE).exists()
        result = go(resume)
    return PruneResult(
        path=directory,
        plan=result.plan,
        linears=result.pruned.linears,
        seconds=time.perf_counter() - started,
        recovery_seconds=None if again else result.recovery_seconds,
        resumed_blocks=result.pruned.resumed_blocks,
        recovery=result.recovery,
        budget=result.budget,
    )


@contextmanager
def _tasks(ray: str | None, source: Source) -> Iterator[Tasks]:
    """Who does the tasks of a run."""
    if ray is None:
        yield source.tasks
        return
    if source.device.type != "cpu":
        raise UsageError("workers of a Ray compute on CPUs", "leave out --ray, or --device")
    from .ray_tasks import on_ray

    with on_ray(ray) as tasks:
        yield tasks


def _planned(source: Source, recipe: Recipe) -> Plan:
    plan = make_plan(source, recipe)
    check_reachable(source, recipe)
    return plan


def _ready(
    source: Source,
    directory: Path,
    recipe: Recipe,
    plan: Plan,
    text: CalibrationText,
    progress: ProgressCallback | None,
) -> Callable[[bool], StepsResult]:
    """The run, which has drawn its windows and written nothing; call it with `resume`."""
    if recipe.is_for_budget or recipe.distills:
        return InSteps(source, directory, recipe, text, progress).go
    sample = draw_sample(source, text, recipe)
    one_shot = OneShot(source, directory, recipe, plan, sample, progress)

    def go(resume: bool) -> StepsResult:
        pruned = one_shot.go(resume)
        return StepsResult(plan, pruned, pruned.tuning_seconds)

    return go
