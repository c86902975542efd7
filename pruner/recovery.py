"""Recovery as a run of its own: for a checkpoint that was pruned before, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RefusedError
from ..files import find_directory, read_json, sha256_file
from ..kernels.formats import Sparse24, Sparse24Int4
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from ..runtime.checkpoint import Checkpoint
from .calibrate import BUILTIN, CalibrationText, load_text
from .device import explained_memory
from .disk import check_disk, handed_on_bytes, training_bytes
from .journal import Journal, locked
from .oneshot import Progress, Sample, draw_sample
from .outdir import STEPS_DIRECTORY, held_bytes, prepare_directory, settle, tidy
from .recipe import IMPORTED, Recipe
from .recover.distill import TrainingPlan, check, check_pair, distill
from .recover.settings import Distillation, DistillProgress, DistillResult
from .source import Source
from .staged import StagedRecovery, check_steps
from .surroundings import surroundings


@dataclass(frozen=True)
class Recovery:
    """How to recover a checkpoint.

    Attributes:
        calib: text to train on: "builtin" or a UTF-8 file.
        minutes: time for the training.
        tokens: instead of a time, so many tokens; 0 for the time.
        bits: 4 rounds a 2:4 checkpoint of 16 bits after most of the training, part by part, and
            trains on behind each (staged.py); 16 leaves every format as it is.
        group: weights a scale of those codes.
        precision: of the training's matrix products: "float32", "bfloat16", or "auto".
        rate: learning rate of the weights, relative to their size.
        ce: weight of the text's own next token beside the parent's prediction of it.
        seed: of the order of windows, and of the windows that calibrate the rounding.
    """

    calib: str = BUILTIN
    minutes: float = 30.0
    tokens: int = 0
    bits: int = 16
    group: int = 128
    precision: str = "auto"
    rate: float = 1e-3
    ce: float = 0.0
    seed: int = 0

    @property
    def settings(self) -> Distillation:
        """Those of the training."""
        return Distillation(
            minutes=self.minutes,
            tokens=self.tokens,
            precision=self.precision,
            learning_rate=self.rate,
            ce=self.ce,
            seed=self.seed,
        )


@dataclass(frozen=True)
class RecoveryPlan(TrainingPlan):
    """And what the run takes of the disk at most: its output, and what lies beside it meanwhile."""

    disk_bytes: int


def plan_recover(
    pruned: str | Path,
    parent: str | Path,
    out: str | Path,
    recovery: Recovery | None = None,
    device: str = "cpu",
) -> RecoveryPlan:
    """What `recover` will do and take, without writing anything; raises as it does.

    Whether `out` is taken, and has room, is for the run to say.
    """
    recovery = recovery or Recovery()
    source, student = Source.open(parent, device), find_directory(pruned)
    recipe = _recipe_of(student, source, recovery)
    text = load_text(recovery.calib)
    if recovery.bits == 4:
        check_steps(source, recovery.settings)
        draw_sample(source, text, recipe)
    checkpoint = Checkpoint.open(student)
    check_pair(source, checkpoint, Path(out))
    plan = check(source, text.text, recovery.settings)
    return RecoveryPlan(**vars(plan), disk_bytes=_disk_bytes(source, checkpoint, recovery))


def recover(
    pruned: str | Path,
    parent: str | Path,
    out: str | Path,
    recovery: Recovery | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Callable[[Progress | DistillProgress], None] | None = None,
) -> DistillResult:
    """Train the checkpoint in `pruned` towards its dense `parent`, and write it into `out`.

    The bytes of the weights are those of a `prune` that distills, if text, seed, tokens and the
    recipe of `pruned` are the same. Killed at any instant, the same call with `resume=True` goes on
    from the last saved state. `device`, cpu, cuda or cuda:N, is where models run.

    Raises:
        UsageError: bad paths, settings, or text; both `resume` and `overwrite`.
        RefusedError: `out` is taken, locked, an input, or belongs to another run; `pruned` was not
            pruned from `parent`; or it is to be rounded and is not 2:4 with 16 bits.
        CheckpointError: a file is damaged.
        CapacityError: the run does not fit in memory or on the disk.
        HalfweaveError: the loss is not finite any more.
    """
    recovery = recovery or Recovery()
    source, student = Source.open(parent, device), find_directory(pruned)
    if Path(out).resolve() == student.resolve():
        raise RefusedError(f"{out} is the input; the input is never modified")
    recipe = _recipe_of(student, source, recovery)
    text = load_text(recovery.calib)
    if recovery.bits == 4:
        check_steps(source, recovery.settings)
    check(source, text.text, recovery.settings)
    directory = prepare_directory(source.path, Path(out), resume, overwrite)
    with locked(directory), explained_memory():
        # All that can refuse the run comes before the one call that may remove a finished model.
        _check(source, Checkpoint.open(student), directory, recovery)
        sample = draw_sample(source, text, recipe) if recovery.bits == 4 else None
        key = _key(source, student, text, recovery)
        settle(directory, overwrite)
        again = resume and (directory / JOURNAL_FILE).exists()
        journal = (Journal.resume if again else Journal.begin)(directory, key)
        if (directory / MANIFEST_FILE).exists():  # a kill came while the run tidied up
            result = _result_of(directory)
        elif sample is not None:
            result = _in_stages(source, student, directory, recipe, sample, recovery, progress)
        else:
            result = distill(
                student,
                source,
                directory,
                text.text,
                recovery.settings,
                resume=again,
                progress=progress,
            )
        tidy(directory)
        journal.remove()
    return result


def _check(source: Source, student: Checkpoint, out: Path, recovery: Recovery) -> None:
    check_pair(source, student, out)
    check_disk(_disk_bytes(source, student, recovery), out, held_bytes(out))


def _disk_bytes(source: Source, student: Checkpoint, recovery: Recovery) -> int:
    """At most, of all that the run itself writes."""
    kept = 0
    for name in (n for index in range(source.block_count) for n in source.linear_names(index)):
        entry = student.linears.get(name)
        is_24 = entry is not None and entry.format in (Sparse24.kind, Sparse24Int4.kind)
        kept += prod(source.linear_shape(name)) // (2 if is_24 else 1)
    if recovery.bits == 16:
        return student.weight_bytes + training_bytes(kept)
    # Beside the output, the training before and what was rounded of it: no larger than the floats.
    return 3 * student.weight_bytes + training_bytes(kept) + handed_on_bytes(kept)


def _key(
    source: Source, student: Path, text: CalibrationText, recovery: Recovery
) -> dict[str, Any]:
    """All that decides the output, as `OneShot.key`; a run is only ever resumed under the same."""
    return {
        "recovery": {k: v for k, v in asdict(recovery).items() if k != "calib"},
        "student": sha256_file(student / MANIFEST_FILE),
        "text": text.sha256,
        **surroundings(source),
    }


def _in_stages(
    source: Source,
    student: Path,
    directory: Path,
    recipe: Recipe,
    sample: Sample,
    recovery: Recovery,
    progress: Callable[[Progress | DistillProgress], None] | None,
) -> DistillResult:
    work = directory / STEPS_DIRECTORY
    work.mkdir(exist_ok=True)
    staged = StagedRecovery(
        source, student, directory, work, recipe, recovery.settings, sample, progress
    )
    return staged.go()


def _result_of(directory: Path) -> DistillResult:
    """What an earlier process did, which had no time left to say so."""
    record = read_json(directory / MANIFEST_FILE)["provenance"]["recovery"]
    return DistillResult.of_record(directory, record)


def _recipe_of(student: Path, source: Source, recovery: Recovery) -> Recipe:
    """What the student was pruned by, ending in the bits that are asked for."""
    path = student / MANIFEST_FILE
    if not path.is_file():
        raise RefusedError(
            f"{student} was not made by halfweave, or is not complete: it has no {MANIFEST_FILE}",
            "recover what halfweave prune wrote",
        )
    try:
        saved = read_json(path)["recipe"]
        recipe = _usual(source) if saved == IMPORTED else Recipe.from_json(saved)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: it holds no recipe") from error
    if recovery.bits == 16:
        return recipe
    formats = {entry.format for entry in Checkpoint.open(student, verify=False).linears.values()}
    if formats != {Sparse24.kind}:
        raise RefusedError(
            f"{student} cannot be rounded to {recovery.bits} bits after training: "
            f"its linears are {', '.join(sorted(formats)) or 'dense'}",
            "prune with --pattern 2:4 --bits 16, or leave --bits out",
        )
    return replace(recipe, bits=recovery.bits, group=recovery.group, seed=recovery.seed)


def _usual(source: Source) -> Recipe:
    """The recipe that says nothing, for a model that others pruned."""
    context = source.family.context
    return Recipe(calib_length=min(Recipe.calib_length, context or Recipe.calib_length))
