"""The output directory: what may be written to, and what an earlier run left in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import RefusedError
from ..files import sync_directory
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE
from .save import is_leftover, is_ours
from .source import Source

# Where a run with several steps keeps what only the next step needs; gone when it is complete.
STEPS_DIRECTORY = ".halfweave-steps"


def prepare_directory(source: Source, out: Path, resume: bool, overwrite: bool) -> Path:
    """Make `out`, or check that it may be written to.

    Raises:
        RefusedError: it is the input, a file, or holds something that is not ours to replace.
    """
    if out.resolve() == source.path.resolve():
        raise RefusedError(f"{out} is the input; the input is never modified")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"{out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    entries = {entry.name for entry in out.iterdir()}
    unfinished = JOURNAL_FILE in entries
    if entries and not unfinished and MANIFEST_FILE not in entries:
        raise RefusedError(
            f"{out} holds other files, which are never overwritten", "choose an empty directory"
        )
    if entries and not overwrite and not (resume and unfinished):
        raise RefusedError(
            f"{out} holds {'an unfinished run' if unfinished else 'a finished model'}",
            "add --resume to go on" if unfinished else "add --overwrite to replace it",
        )
    return out


def settle(directory: Path, overwrite: bool) -> None:
    """Under the lock: clear what a killed run left over, or, as asked, the whole old model."""
    if overwrite:
        # A journal marks the directory as unfinished from here on, whenever this is interrupted.
        (directory / JOURNAL_FILE).touch()
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
    for entry in sorted(directory.iterdir()):
        if entry.name == STEPS_DIRECTORY:
            if overwrite:
                shutil.rmtree(entry)
            continue
        stale = is_leftover(entry.name) or (overwrite and is_ours(entry.name))
        if stale and entry.name != JOURNAL_FILE:
            entry.unlink()


def publish(inner: Path) -> None:
    """Move the complete model in `inner` two directories up, its manifest last.

    Killed on the way, the same call goes on: what has been moved is simply no longer there. What
    a killed writer left half-written stays behind.
    """
    whole = [entry for entry in inner.iterdir() if not is_leftover(entry.name)]
    for entry in sorted(whole, key=lambda entry: entry.name == MANIFEST_FILE):
        entry.replace(inner.parent.parent / entry.name)
    sync_directory(inner.parent.parent)
