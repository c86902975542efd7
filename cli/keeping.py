"""Where the document of a measurement goes: beside its model and into its card, or into a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HalfweaveError, UsageError
from .console import Console


def check_out(out: Path | None) -> None:
    """Make the folder of `--out FILE`, before hours of work for it are lost.

    Raises:
        UsageError: no file can be written there.
    """
    if out is None:
        return
    if out.is_dir():
        raise UsageError(f"{out} cannot be written: it is a directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error


def has_tasks(model: str, out: Path | None) -> bool:
    """Whether what is kept of a model's quality has figures of tasks, which would be lost."""
    from ..files import find_directory
    from ..report.documents import EvalDocument, document_path, read_document

    try:
        found = read_document(out or document_path(find_directory(model), "eval"))
    except HalfweaveError:
        return False
    return isinstance(found, EvalDocument) and bool(found.tasks)


def keep(
    console: Console,
    document: Mapping[str, Any],
    model: str | None,
    save: bool = True,
    out: Path | None = None,
) -> None:
    """Save a document in `out`, or else beside `model` and its figures in the model card.

    A disk that cannot be written to is no failed measurement: that it was not kept is told.
    """
    from ..files import MAX_JSON_BYTES, find_directory
    from ..report.card import update_card
    from ..report.documents import document_path, write_document

    if out is not None:
        file = out
    elif save and model is not None:
        file = document_path(find_directory(model), document["kind"])
    else:
        return
    try:
        write_document(file, document)
        if model is not None and out is None:
            update_card(model)
    except (OSError, HalfweaveError) as error:
        why = error.message if isinstance(error, HalfweaveError) else error.strerror
        console.tell(f"not kept: {file}: {why}")
        console.tell("next: the same command with --out FILE keeps it elsewhere")
        return
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        console.tell(f"{file} has {size} bytes, more than are read: ask for fewer requests")
    console.tell(f"kept in {file}")
