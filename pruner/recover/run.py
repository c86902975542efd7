"""The training loop: from its beginning, or a saved state, to the finished checkpoint.

A number of steps that is asked for as minutes is resolved once, from the time the first steps take;
after that no clock has any say in what is computed. Knows steps, states and measurements; not how
models are opened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import HalfweaveError
from ...runtime.checkpoint import Checkpoint
from .output import stored_tensors, write_checkpoint
from .settings import (
    TIMED_STEPS,
    CurvePoint,
    Distillation,
    DistillProgress,
    DistillResult,
    ProgressCallback,
)
from .state import STATE_FILE, Position, hand_on_moments, save_moments, save_state
from .targets import Targets
from .trainer import Trainer


@dataclass(frozen=True)
class Job:
    """What a run works on, and what identifies it."""

    checkpoint: Checkpoint
    out: Path
    settings: Distillation
    key: Mapping[str, Any]
    train_windows: int
    earlier: Mapping[str, Any] | None = None  # record of a training before the codes were rounded
    before: Path | None = None  # where that training left Adam's moments
    goes_on: bool = False  # another training takes them over


class Run:
    """One training loop, from its beginning or from a saved state, to the finished checkpoint."""

    def __init__(
        self, job: Job, trainer: Trainer, targets: Targets, progress: ProgressCallback | None
    ) -> None:
        """`targets` are those that `trainer` trains on; asked only for the time they took."""
        self._job, self._trainer, self._targets = job, trainer, targets
        self._progress = progress
        self._started = self._saved = time.perf_counter()
        self._minutes_before = 0.0

    def go(self, saved: tuple[Position, dict[str, Tensor]] | None) -> DistillResult:
        """Train from `saved`, or from the beginning, and write the checkpoint.

        Raises:
            HalfweaveError: a loss is not finite.
            CapacityError: the disk is full; the last state is still there.
        """
        if saved is None:
            position = self._begin()
        else:
            position, tensors = saved
            self._minutes_before = position.minutes
            self._trainer.restore(tensors, position.done)
        while position.done < position.total_steps:
            position = self._one_step(position)
        return self._finish(position)

    def _begin(self) -> Position:
        settings = self._job.settings
        started = time.perf_counter()
        before = self._trainer.held_out_kl()
        measuring = time.perf_counter() - started
        if not math.isfinite(before):
            raise HalfweaveError(
                f"{self._job.checkpoint.path}: its KL from the parent is not finite even untrained",
                "prune again, without a linear that is not finite",
            )
        if settings.tokens:
            return Position(settings.tokens // settings.batch_tokens, 0, before, 0.0, ())
        position = Position(0, 0, before, 0.0, ())
        timed = teaching = 0.0
        for index in range(TIMED_STEPS):
            started, taught = time.perf_counter(), self._targets.seconds
            position = self._one_step(position)
            if index:  # the first step also pays for what is done once
                timed += time.perf_counter() - started
                teaching += self._targets.seconds - taught
        count = TIMED_STEPS - 1
        # The first measurement also ran the parent: about twice what each later one takes.
        left = settings.minutes * 60 - measuring * (1 + settings.curve_points) / 2
        per_step = (timed - teaching) / count
        total = self._steps_within(left, per_step, teaching / count)
        position = replace(position, total_steps=max(TIMED_STEPS, total))
        self._save(position)
        return position

    def _steps_within(self, seconds: float, per_step: float, teaching: float) -> int:
        """Steps that fit; the parent runs only in the first epoch."""
        first_epoch = self._job.train_windows / self._job.settings.windows_per_step
        steps = seconds / (per_step + teaching)
        if steps > first_epoch:
            steps = (seconds - first_epoch * teaching) / per_step
        return int(steps)

    def _one_step(self, position: Position) -> Position:
        settings = self._job.settings
        loss = self._trainer.step(position.done, position.total_steps)
        done = position.done + 1
        position = replace(position, done=done, minutes=self._minutes())
        held_out = None
        if done in _measured_steps(position.total_steps, settings.curve_points):
            held_out = self._trainer.held_out_kl()
            position = self._with_point(position, held_out)
        if position.total_steps and self._due():
            self._save(position)
        self._tell(position, loss, held_out)
        return position

    def _finish(self, position: Position) -> DistillResult:
        job, trainer = self._job, self._trainer
        packed = {name: latent.packed(name) for name, latent in trainer.latents.items()}
        gains = {
            name: gain.detach().to(job.checkpoint.tensor(name).dtype)
            for name, gain in trainer.gains.items()
        }
        weights = {f"{name}.weight": linear.unpack() for name, linear in packed.items()}
        trainer.put({**weights, **gains})
        after = trainer.held_out_kl()
        position = self._with_point(replace(position, minutes=self._minutes()), after)
        rolled_back = not after < position.before
        changed = {} if rolled_back else stored_tensors(packed, gains)
        after = position.before if rolled_back else after
        recovery = _recovery(job, position, after, rolled_back)
        if job.goes_on and not rolled_back:
            save_moments(job.out, trainer.moments(), trainer.taken + position.done)
        elif job.goes_on and job.before is not None:
            hand_on_moments(job.before, job.out)
        manifest = job.checkpoint.manifest or {}
        write_checkpoint(job.checkpoint.path, job.out, manifest, changed, recovery)
        (job.out / STATE_FILE).unlink(missing_ok=True)
        tokens = position.total_steps * job.settings.batch_tokens
        return DistillResult(
            path=job.out,
            tokens=tokens,
            steps=position.total_steps,
            before=position.before,
            after=after,
            undone=int(rolled_back),
            curve=position.curve,
            minutes=self._minutes(),
        )

    def _with_point(self, position: Position, kl: float) -> Position:
        tokens = position.done * self._job.settings.batch_tokens
        point = CurvePoint(tokens, position.minutes, kl)
        return replace(position, curve=(*position.curve, point))

    def _minutes(self) -> float:
        return self._minutes_before + (time.perf_counter() - self._started) / 60

    def _due(self) -> bool:
        return time.perf_counter() - self._saved >= self._job.settings.save_minutes * 60

    def _save(self, position: Position) -> None:
        save_state(self._job.out, self._job.key, position, self._trainer.tensors())
        self._saved = time.perf_counter()

    def _tell(self, position: Position, loss: float, held_out: float | None) -> None:
        if self._progress is None:
            return
        per_step = self._job.settings.batch_tokens
        done, total = position.done * per_step, position.total_steps * per_step
        self._progress(DistillProgress(done, total, position.minutes, loss, held_out))


def _measured_steps(total: int, points: int) -> set[int]:
    """Steps after which the held-out windows are measured; the end is measured as stored."""
    return {round(total * (i + 1) / (points + 1)) for i in range(points)} - {0, total}


def _recovery(job: Job, position: Position, after: float, rolled_back: bool) -> dict[str, Any]:
    """The manifest's entry. Without times: the same run yields the same bytes."""
    earlier = {} if job.earlier is None else {"before_rounding": dict(job.earlier)}
    return {
        **earlier,
        "method": "distill",
        "settings": job.settings.to_json(),
        "tokens": position.total_steps * job.settings.batch_tokens,
        "steps": position.total_steps,
        "text_sha256": job.key["text"],
        "threads": job.key["threads"],
        "held_out_kl": {"before": position.before, "after": after},
        "curve": [{"tokens": point.tokens, "kl": point.kl} for point in position.curve],
        "rolled_back": rolled_back,
    }
