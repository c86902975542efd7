"""The output directory: what may be written to, and what an earlier run left in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import RefusedError, UsageError
from ..files import make_directory, sync_directory
from ..kernels.schema import (
    JOURNAL_FILE,
    MANIFEST_FILE,
    MEASURED_DIRECTORY,
    REPORT_DIRECTORY,
    REPORT_FILE,
)
from .journal import blank, is_begun
from .recover.state import STATE_FILE
from .save import is_leftover, is_ours

# Where a run with several steps keeps what only the next step needs; gone when it is complete.
STEPS_DIRECTORY = ".halfweave-steps"
# What was measured of an old model goes with it.
_OUR_DIRECTORIES = (STEPS_DIRECTORY, MEASURED_DIRECTORY, REPORT_DIRECTORY)


def prepare_directory(source: Path, out: Path, resume: bool, overwrite: bool) -> Path:
    """Make `out`, or check that it may be written to; raises as `check_directory`."""
    check_directory(source, out, resume, overwrite)
    make_directory(out)
    return out


def check_directory(source: Path, out: Path, resume: bool, overwrite: bool) -> None:
    """See that a model of `source` may be written to `out`, which is left as it is.

    Raises:
        UsageError: both `resume` and `overwrite`; or it is to be below a file.
        RefusedError: it is the input, a file, or holds something that is not ours to replace.
    """
    if resume and overwrite:
        raise UsageError(
            "--resume goes on with what --overwrite removes",
            "give one of the two",
        )
    if out.resolve() == source.resolve():
        raise RefusedError(f"{out} is the input; the input is never modified")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"{out} is a file")
    if not out.exists():
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UsageError(f"{out} cannot be made: {above} is a file", "choose another directory")
    entries = {entry.name for entry in out.iterdir()} if out.exists() else set()
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


def held_bytes(directory: Path) -> int:
    """Bytes of ours in `directory`: an overwriting run frees them, a resumed one has written them.

    What `settle` removes in either case counts as well.
    """
    ours = [entry for entry in directory.iterdir() if _is_ours(entry)]
    files = (file for entry in ours for file in (entry, *entry.rglob("*")) if not file.is_dir())
    return sum(file.lstat().st_size for file in files)


def settle(directory: Path, overwrite: bool) -> None:
    """Under the lock: clear what a killed run left over, or, as asked, the whole old model.

    A journal that names no run is left by a kill in here, or right after: the same goes on then.

    Raises:
        CheckpointError: the journal to go on with is damaged.
        CapacityError: the disk is full.
    """
    if overwrite or not is_begun(directory):
        _clear(directory)
        return
    for entry in (*directory.iterdir(), *(directory / STEPS_DIRECTORY).rglob("*")):
        if is_leftover(entry.name):
            entry.unlink()


def tidy(directory: Path) -> None:
    """Remove what only an unfinished run needs, once the model in `directory` is complete."""
    shutil.rmtree(directory / STEPS_DIRECTORY, ignore_errors=True)
    (directory / STATE_FILE).unlink(missing_ok=True)


def publish(inner: Path) -> None:
    """Move the complete model in `inner` two directories up, its manifest last.

    Killed on the way, the same call goes on: what has been moved is simply no longer there. What
    a killed writer left half-written stays behind.
    """
    whole = [entry for entry in inner.iterdir() if not is_leftover(entry.name)]
    for entry in sorted(whole, key=lambda entry: entry.name == MANIFEST_FILE):
        entry.replace(inner.parent.parent / entry.name)
    sync_directory(inner.parent.parent)


def _clear(directory: Path) -> None:
    """Remove all that is ours but an empty journal.

    That comes first: lines of the old one would claim, to a resumed run, files that are gone.
    """
    blank(directory)
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    for entry in sorted(directory.iterdir()):
        if entry.name in _OUR_DIRECTORIES:
            shutil.rmtree(entry)
        elif _is_ours(entry) and entry.name != JOURNAL_FILE:
            entry.unlink()
    sync_directory(directory)


def _is_ours(entry: Path) -> bool:
    return entry.name in (*_OUR_DIRECTORIES, REPORT_FILE) or is_ours(entry.name)
