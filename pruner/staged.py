"""Recovery of a model that ends in 4-bit codes: train, then round, then train what is left to.

Codes move in jumps, and a training step that would move one by a tenth of a code does nothing. So
the weights are trained as floats first, on their masks; then rounded with the solver of the pruner,
towards the outputs of the trained model; and then trained a little with their codes, starting from
what was rounded away. Each step leaves a complete checkpoint in a directory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..files import read_json
from ..kernels.schema import MANIFEST_FILE
from ..runtime.checkpoint import Checkpoint
from .oneshot import OneShot, Progress, Sample
from .plan import make_plan
from .recipe import Recipe
from .recover.distill import distill
from .recover.settings import Distillation, DistillProgress, DistillResult
from .source import Source, Trained

_FLOAT_SHARE = 0.9  # of the time, or of the tokens
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
        """Do what is left to do. Raises as `distill` and `prune` do."""
        floats, rounded = self.work / "floats", self.work / "rounded"
        settings = self.settings.fitted(self.source.config.get("max_position_embeddings"))
        trained = self._train(floats, _for_floats(settings))
        self._round(floats, rounded)
        return distill(
            rounded,
            self.source,
            self.out,
            self.sample.text.text,
            _for_codes(settings, trained),
            near=floats,
            resume=True,
            progress=self.progress,
        )

    def _train(self, out: Path, settings: Distillation) -> int:
        """Train as floats, unless that is done; the tokens it took."""
        if not (out / MANIFEST_FILE).exists():
            out.mkdir(exist_ok=True)
            distill(
                self.student,
                self.source,
                out,
                self.sample.text.text,
                settings,
                resume=True,
                progress=self.progress,
            )
        tokens: int = read_json(out / MANIFEST_FILE)["provenance"]["recovery"]["tokens"]
        return tokens

    def _round(self, floats: Path, out: Path) -> None:
        out.mkdir(exist_ok=True)
        source = Trained.of(self.source, Checkpoint.open(floats))
        plan = make_plan(self.source, self.recipe)
        OneShot(source, out, self.recipe, plan, self.sample, self.progress).ensure()


def _for_floats(settings: Distillation) -> Distillation:
    step, share = settings.batch_tokens, _FLOAT_SHARE
    if not settings.tokens:
        return replace(settings, minutes=share * settings.minutes)
    total = settings.tokens // step
    steps = max(1, min(math.ceil(share * total), total - 1))
    return replace(settings, tokens=steps * step)


def _for_codes(settings: Distillation, float_tokens: int) -> Distillation:
    """As many steps as make the whole of which `_for_floats` takes the share that was trained."""
    step, rate = settings.batch_tokens, _CODES_RATE
    steps = math.floor(float_tokens // step * (1 / _FLOAT_SHARE - 1) + 1e-9)
    return replace(
        settings,
        tokens=max(1, steps) * step,
        learning_rate=rate * settings.learning_rate,
        scale_rate=rate * settings.scale_rate,
        gain_rate=rate * settings.gain_rate,
    )
