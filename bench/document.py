"""The one JSON document of a measurement: what was measured, where, by what, and every raw sample.

docs/benchmarks.md describes its fields.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..files import find_directory, read_json, sha256_file
from ..kernels.schema import MANIFEST_FILE
from ..runtime.hardware import Hardware, versions

SCHEMA_VERSION = 2
KINDS = ("kernel", "offline", "serve")
_PACKAGE = Path(__file__).resolve().parent.parent


def about_model(path: str | Path) -> dict[str, Any]:
    """Path, name and digest of a model directory: SHA-256 of its manifest, or of its config.

    Raises:
        UsageError: there is no such directory.
        CheckpointError: it has neither file.
    """
    directory = find_directory(path)
    vouching = [directory / MANIFEST_FILE, directory / "config.json"]
    found = next((file for file in vouching if file.is_file()), None)
    if found is None:
        raise CheckpointError(f"{directory / 'config.json'} is missing")
    return {
        "path": str(path),
        "name": directory.resolve().name,
        "digest": sha256_file(found),
    }


def document(
    kind: str,
    machine: Hardware,
    *,
    model: Mapping[str, Any],
    plan: Any,
    body: Mapping[str, Any],
    notes: Sequence[str],
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """What is printed and saved; `body` has the figures of this kind, `plan` is a dataclass."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "hardware": {**asdict(machine), "line": machine.line},
        "versions": versions(),
        "commit": _commit(),
        "model": dict(model),
        "plan": asdict(plan),
        **body,
        "notes": list(notes),
    }


def read_document(path: Path) -> dict[str, Any]:
    """A saved document of any kind.

    Raises:
        UsageError: it is no such document, or of another schema.
    """
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise UsageError(error.message) from error
    version = found.get("schema_version")
    if version != SCHEMA_VERSION or found.get("kind") not in KINDS:
        raise UsageError(
            f"{path} is no measurement of schema {SCHEMA_VERSION}: it has kind "
            f"{str(found.get('kind'))[:40]!r} and schema {str(version)[:40]!r}",
            f"what this version of halfweave bench measures: {', '.join(KINDS)}",
        )
    return found


def _commit() -> str | None:
    """The commit that this code was checked out from; None where it is no checkout."""
    if not (_PACKAGE / ".git").exists():
        return None
    command = ["git", "-C", str(_PACKAGE), "rev-parse", "HEAD"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() or None if ran.returncode == 0 else None
