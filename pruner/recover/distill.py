"""Whole-model recovery: a pruned checkpoint is trained towards its dense parent's outputs.

The loss is taken over the model's whole output, the masks stay, and what is written has the very
formats of what was given. Same inputs, settings, number of tokens, library versions, device and
thread count: same bytes, interrupted or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, RefusedError
from ...files import sha256_file
from ...kernels.schema import MANIFEST_FILE
from ...runtime.checkpoint import Checkpoint
from ..plan import target_of
from ..recipe import IMPORTED, Recipe
from ..save import is_leftover
from ..source import Source, token_ids
from ..surroundings import surroundings
from .latents import Latent
from .memory import MOST_TARGETS_BYTES, check_memory, needed_bytes
from .network import Network, check_family, evenly_spaced
from .precision import resolved
from .run import Job, Run
from .settings import Distillation, DistillResult, ProgressCallback
from .state import STATE_FILE, began_with, load_moments, load_state
from .targets import Targets
from .trainer import Trainer
from .windows import Windows


@dataclass(frozen=True)
class Link:
    """Where a training stands among several.

    `before` is the trained checkpoint that its student's codes were rounded from, if any, and that
    it goes on from; whether another one `goes_on` from it.
    """

    before: Path | None = None
    goes_on: bool = False


def distill(
    student: Path,
    parent: Source,
    out: Path,
    text: str,
    settings: Distillation | None = None,
    *,
    link: Link = Link(),
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> DistillResult:
    """Train the checkpoint in `student` towards its dense `parent` and write it into `out`.

    Models run on the parent's device. `out` is there, is the caller's to fill, and is not
    `student`. It is complete when its manifest is there. Killed at any instant, the same call with
    `resume=True` yields the same bytes.

    Raises:
        UsageError: bad settings, or a text that is too short for them.
        RefusedError: `student` was not pruned from `parent`, or the state in `out` belongs to
            another run.
        CheckpointError: a file is damaged.
        CapacityError: the run does not fit in memory or on the disk.
        HalfweaveError: the loss is not finite any more.
    """
    settings = settings or Distillation()
    if resume and settings.precision == "auto":  # another timing must not end what has begun
        began = began_with(out).get("precision", settings.precision)
        settings = replace(settings, precision=began)
    checkpoint = Checkpoint.open(student)
    check_pair(parent, checkpoint, out)
    settings, windows, targets_bytes = _prepare(parent, text, settings)
    floats = None if link.before is None else Checkpoint.open(link.before)
    key = _key(parent, (student, link.before), text, settings)
    saved = load_state(out, key) if resume else None
    _clear(out, saved is None)
    on_device = windows.to(parent.device)
    trainer, targets = make_trainer(
        parent, (checkpoint, floats), on_device, settings, targets_bytes
    )
    _go_on(trainer, link)
    record = _recovery_of(floats)
    job = Job(checkpoint, out, settings, key, len(windows.train), record, link.before, link.goes_on)
    return Run(job, trainer, targets, progress).go(saved)


def _go_on(trainer: Trainer, link: Link) -> None:
    """Hand the moments on that the training before left; none of them stay in memory twice."""
    moments = None if link.before is None else load_moments(link.before)
    if moments is not None:
        trainer.adopt(*moments)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will do and take. `minutes` count where no tokens were asked for."""

    windows: int
    length: int
    minutes: float
    tokens: int
    precision: str
    peak_memory_bytes: int


def check(source: Source, text: str, settings: Distillation) -> TrainingPlan:
    """What can be told before there is a student; raises as `distill` does."""
    fitted, windows, targets_bytes = _prepare(source, text, settings)
    return TrainingPlan(
        len(windows.train),
        fitted.length,
        fitted.minutes,
        fitted.tokens,
        fitted.precision,
        needed_bytes(source, fitted, targets_bytes),
    )


def _prepare(
    source: Source, text: str, settings: Distillation
) -> tuple[Distillation, Windows, int]:
    """Settings that fit the model, the windows, and bytes for the parent's outputs."""
    check_family(source.family)
    settings = settings.fitted(source.family.context)
    settings = replace(settings, precision=resolved(settings.precision, source.device))
    windows = Windows.cut(token_ids(source, text), settings.length, settings.held_out)
    targets_bytes = min(MOST_TARGETS_BYTES, _targets_bytes(source, windows, settings))
    check_memory(needed_bytes(source, settings, targets_bytes), source.device)
    return settings, windows, targets_bytes


def make_trainer(
    source: Source,
    checkpoints: tuple[Checkpoint, Checkpoint | None],
    windows: Windows,
    settings: Distillation,
    targets_bytes: int,
) -> tuple[Trainer, Targets]:
    """The trainer of a student, and the targets of its training windows.

    `checkpoints` are the student and the floats that its codes were rounded from, if any; `windows`
    are on the source's device, and the settings' precision is a resolved one.

    Raises:
        CheckpointError: a file is damaged.
    """
    checkpoint, floats = checkpoints
    recipe = _recipe_of(checkpoint)
    taps = _taps(source, settings)
    latents: dict[str, Latent] = {}
    linears = {name for index in range(source.block_count) for name in source.linear_names(index)}

    def read(name: str) -> Tensor:
        linear = name.removesuffix(".weight")
        if linear not in linears or linear == name:
            return _aligned(checkpoint.tensor(name), source.device)
        near = None if floats is None else floats.linear(linear).to(source.device).unpack()
        stored = checkpoint.linear(linear).to(source.device)
        latents[linear] = Latent.of(stored, near, pruned=_is_pruned(recipe, linear))
        return torch.empty_like(latents[linear].value)

    network = Network(source, read, taps)
    parent = Network(source, lambda name: _aligned(source.tensors.read(name), source.device), taps)
    targets = Targets(parent, windows.train, targets_bytes, settings.precision)
    held_out = Targets(parent, windows.held_out, targets_bytes)
    both = (targets, held_out)
    return Trainer(network, latents, parent.head, windows, both, settings), targets


def _recipe_of(checkpoint: Checkpoint) -> Recipe | None:
    """What it was pruned by, if its manifest says so and it was not another tool."""
    saved = (checkpoint.manifest or {}).get("recipe")
    return None if saved in (None, IMPORTED) else Recipe.from_json(saved)


def _is_pruned(recipe: Recipe | None, linear: str) -> bool:
    target = None if recipe is None else target_of(recipe, linear)
    return target is not None and not target.pattern.is_dense


def _aligned(tensor: Tensor, device: torch.device) -> Tensor:
    """fp32, in memory of torch's own.

    A file's bytes lie anywhere in memory, and the last bits of a matrix product depend on where.
    """
    return tensor.to(device, torch.float32, copy=True)


def _taps(source: Source, settings: Distillation) -> list[int]:
    wanted = settings.hidden_blocks if settings.hidden_weight else 0
    return evenly_spaced(source.block_count, wanted) if wanted else []


def _targets_bytes(source: Source, windows: Windows, settings: Distillation) -> int:
    """Bytes of all windows' targets."""
    hidden = source.linear_shape(source.linear_names(0)[0])[1]
    windows_in_all = len(windows.train) + len(windows.held_out)
    states = 1 + len(_taps(source, settings))
    return 2 * hidden * settings.length * windows_in_all * states


def _clear(out: Path, state_too: bool) -> None:
    """Remove what a killed run left half-written and, to start over, its state."""
    for entry in out.iterdir():
        if is_leftover(entry.name) or (state_too and entry.name == STATE_FILE):
            entry.unlink()


def check_pair(source: Source, checkpoint: Checkpoint, out: Path) -> None:
    """Refuse a student that was not pruned from `source`, and an `out` that is one of the two.

    Raises:
        RefusedError: it is so, or nothing tells what the student was pruned from.
        CheckpointError: a linear of theirs has two shapes.
    """
    if out.resolve() in (checkpoint.path.resolve(), source.path.resolve()):
        raise RefusedError(f"{out} is an input; inputs are never modified")
    if checkpoint.manifest is None:
        raise RefusedError(
            f"{checkpoint.path} was not made by halfweave: it has no {MANIFEST_FILE}",
            "recover what halfweave prune wrote",
        )
    base = checkpoint.manifest.get("provenance", {}).get("base", {}).get("sha256")
    if base is not None and base != source.hashes:
        raise RefusedError(
            f"{checkpoint.path} was not pruned from {source.path}: their files' hashes differ",
            "give the dense model that was pruned",
        )
    for name in (n for i in range(source.block_count) for n in source.linear_names(i)):
        if checkpoint.linear_shape(name) != source.linear_shape(name):
            raise CheckpointError(f"{name} has another shape in {checkpoint.path} than its parent")


def _recovery_of(floats: Checkpoint | None) -> Mapping[str, Any] | None:
    """What the manifest says of the training before the rounding."""
    manifest = {} if floats is None else floats.manifest or {}
    found: Mapping[str, Any] | None = manifest.get("provenance", {}).get("recovery")
    return found


def _key(
    source: Source, students: tuple[Path, Path | None], text: str, settings: Distillation
) -> dict[str, Any]:
    """What a saved state must have in common with the run that goes on from it."""
    budget = {"tokens": settings.tokens} if settings.tokens else {"minutes": settings.minutes}
    return {
        "settings": {**settings.to_json(), **budget},
        "student": [sha256_file(path / MANIFEST_FILE) for path in students if path],
        "text": hashlib.sha256(text.encode()).hexdigest(),
        **surroundings(source),
    }
