"""Recovery of a model that ends in 4-bit codes: train, then round, then train what is left to.

Codes move in jumps, and a training step that would move one by a tenth of a code does nothing. So
the weights are trained as floats first, on their masks; then rounded with the solver of the pruner,
towards the outputs of the trained model, which may move 2:4 masks; and then trained a little with
their codes, starting from what was rounded away. Each step leaves a complete checkpoint in a
directory of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from ..files import read_json
from ..kernels.schema import MANIFEST_FILE
from ..runtime.checkpoint import Checkpoint
from .oneshot import OneShot, Progress, Sample
from .plan import make_plan
from .recipe import Recipe
from .recover.distill import distill
from .recover.settings import Distillation, DistillProgress, DistillResult
from .source import Source, Trained

_CODES_SHARE = 10  # one step in so many trains codes
_CODES_RATE = 0.1  # of the floats' rates: at the full ones codes get worse (docs/pruning.md)


@dataclass(frozen=True)
class StagedRecovery:
    """One run: `student` (16 bits, pruned from `source`) becomes codes by `recipe` in `out`.

    `work` is a directory for what only the next step needs. `sample` calibrates the rounding.
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
        floats, rounded = self.work / "floats", self.work / "rounded"
        settings = _fitted(self.source, self.settings)
        trained = self._train(floats, for_floats(settings))
        self._round(floats, rounded)
        codes = distill(
            rounded,
            self.source,
            self.out,
            self.sample.text.text,
            for_codes(settings, trained.tokens),
            near=floats,
            resume=True,
            progress=self.progress,
        )
        return codes.behind(trained)

    def _train(self, out: Path, settings: Distillation) -> DistillResult:
        """Train as floats, unless an earlier process did."""
        if (out / MANIFEST_FILE).exists():
            record = read_json(out / MANIFEST_FILE)["provenance"]["recovery"]
            return DistillResult.of_record(out, record)
        out.mkdir(exist_ok=True)
        return distill(
            self.student,
            self.source,
            out,
            self.sample.text.text,
            settings,
            resume=True,
            progress=self.progress,
        )

    def _round(self, floats: Path, out: Path) -> None:
        out.mkdir(exist_ok=True)
        source = Trained.of(self.source, Checkpoint.open(floats))
        plan = make_plan(self.source, self.recipe)
        OneShot(source, out, self.recipe, plan, self.sample, self.progress).ensure()


def check_steps(source: Source, settings: Distillation) -> None:
    """Refuse a number of tokens that leaves nothing for one of the two trainings.

    Raises:
        UsageError: it is less than two steps.
    """
    step = _fitted(source, settings).batch_tokens
    if settings.tokens and settings.tokens < 2 * step:
        raise UsageError(
            f"recovery: {settings.tokens} tokens are one step of {step}, and what ends in codes is "
            "trained twice, as floats and as codes",
            f"give {2 * step} tokens or more",
        )


def for_floats(settings: Distillation) -> Distillation:
    """Those of the training as floats; `settings` fit the model and give two steps."""
    if not settings.tokens:
        return replace(settings, minutes=settings.minutes * (1 - 1 / _CODES_SHARE))
    steps = settings.tokens // settings.batch_tokens
    codes = max(1, steps // _CODES_SHARE)
    return replace(settings, tokens=(steps - codes) * settings.batch_tokens)


def for_codes(settings: Distillation, float_tokens: int) -> Distillation:
    """Those of the training of the codes, after `float_tokens` as floats.

    It takes what is left of a number of tokens. After a training by the clock it takes as many
    steps as make the whole a number that `for_floats` would part in the same way, so that a recipe
    with that number gives the same bytes.
    """
    step, rate = settings.batch_tokens, _CODES_RATE
    trained = float_tokens // step
    by_clock = max(1, trained // (_CODES_SHARE - 1))
    steps = settings.tokens // step - trained if settings.tokens else by_clock
    return replace(
        settings,
        tokens=steps * step,
        learning_rate=rate * settings.learning_rate,
        scale_rate=rate * settings.scale_rate,
        gain_rate=rate * settings.gain_rate,
    )


def _fitted(source: Source, settings: Distillation) -> Distillation:
    return settings.fitted(source.family.context)
