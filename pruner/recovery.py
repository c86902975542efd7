"""Recovery as a run of its own: for a checkpoint that was pruned before, here or elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import RefusedError
from ..files import find_directory, sha256_file
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from .calibrate import BUILTIN, load_text
from .journal import Journal, locked
from .outdir import prepare_directory, settle
from .recover.distill import distill
from .recover.settings import Distillation, DistillResult, ProgressCallback
from .source import Source


def recover(
    pruned: str | Path,
    parent: str | Path,
    out: str | Path,
    settings: Distillation | None = None,
    *,
    calib: str | Path = BUILTIN,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> DistillResult:
    """Train the checkpoint in `pruned` towards its dense `parent`, and write it into `out`.

    Masks and formats stay (recover/distill.py). The bytes are those of `prune` with
    `recover="distill"`, if text, seed and tokens are the same. Killed at any instant, the same call
    with `resume=True` goes on from the last saved state.

    Raises:
        UsageError: bad paths, settings, or text.
        RefusedError: `out` is taken, locked, an input, or belongs to another run; or `pruned` was
            not pruned from `parent`.
        CheckpointError: a file is damaged.
        CapacityError: the run does not fit in memory or on the disk.
        HalfweaveError: the loss is not finite any more.
    """
    settings = settings or Distillation()
    source, student = Source.open(parent), find_directory(pruned)
    if Path(out).resolve() == student.resolve():
        raise RefusedError(f"{out} is the input; the input is never modified")
    if not (student / MANIFEST_FILE).is_file():
        raise RefusedError(
            f"{student} was not made by halfweave, or is not complete: it has no {MANIFEST_FILE}",
            "recover what halfweave prune wrote",
        )
    text = load_text(calib)
    directory = prepare_directory(source, Path(out), resume, overwrite)
    with locked(directory):
        settle(directory, overwrite)
        again = resume and (directory / JOURNAL_FILE).exists()
        key = {
            "recovery": settings.to_json(),
            "student": sha256_file(student / MANIFEST_FILE),
            "text": text.sha256,
        }
        journal = (Journal.resume if again else Journal.begin)(directory, key)
        result = distill(
            student, source.path, directory, text.text, settings, resume=again, progress=progress
        )
        journal.remove()
    return replace(result, path=directory)
