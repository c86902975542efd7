"""The record of a run in progress: what was asked, and which shards are safely on the disk.

One JSON line per fact, each flushed to the disk before the next step begins, so that a run killed
at any instant can go on. The directory itself is locked while a process works in it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RefusedError
from ..files import disk_full_as_error, sync_directory
from ..kernels.schema import JOURNAL_FILE, MANIFEST_FILE


@dataclass(frozen=True)
class LinearRecord:
    """What happened to one linear; the manifest lists these."""

    format: str
    shape: tuple[int, int]
    group: int | None
    method: str
    relative_error: float | None
    note: str = ""
    held_out_error: float | None = None  # to the mixed target, on windows pruning did not see
    baseline_error: float | None = None  # SparseGPT's, on the same windows
    tokens: int | None = None  # that calibration sent to an expert; None: all of them

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LinearRecord:
        """Undo `asdict` after a trip through JSON."""
        return cls(**{**value, "shape": tuple(value["shape"])})


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard: its file, hash and size, and the linears inside."""

    file: str
    sha256: str
    bytes: int
    linears: Mapping[str, LinearRecord] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardRecord:
        """Undo `asdict` after a trip through JSON."""
        linears = {name: LinearRecord.from_json(entry) for name, entry in value["linears"].items()}
        return cls(value["file"], value["sha256"], value["bytes"], linears)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the lock goes with the process, however it ends.

    Raises:
        RefusedError: another process holds it; the message names its id.
    """
    fd = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusedError(
                f"{directory} is being written by process {_owner(directory)}",
                "wait for it, or choose another output directory",
            ) from error
        yield
    finally:
        os.close(fd)


def blank(directory: Path) -> None:
    """Leave an empty journal: the directory is unfinished from here on, and nothing in it counts.

    Raises:
        CapacityError: the disk is full.
    """
    path = directory / JOURNAL_FILE
    with disk_full_as_error(path):
        with open(path, "wb") as file:
            os.fsync(file.fileno())
        sync_directory(directory)


def is_begun(directory: Path) -> bool:
    """Whether a journal in `directory` says which run the files beside it belong to.

    Raises:
        CheckpointError: the journal is damaged.
    """
    path = directory / JOURNAL_FILE
    return path.exists() and _key_in(_read(path)) is not None


class Journal:
    """Append-only; call inside `locked`."""

    def __init__(self, directory: Path, shards: list[ShardRecord]) -> None:
        self._path = directory / JOURNAL_FILE
        self.shards = shards

    @classmethod
    def begin(cls, directory: Path, key: Mapping[str, Any]) -> Journal:
        """Start a new journal for a run that `key` identifies, and unmake a model that is there.

        Its manifest goes before the key comes: a manifest beside a key belongs to that run.
        """
        journal = cls(directory, [])
        blank(directory)
        (directory / MANIFEST_FILE).unlink(missing_ok=True)
        journal._append({"key": key})
        journal._append({"process": os.getpid()})
        sync_directory(directory)
        return journal

    @classmethod
    def resume(cls, directory: Path, key: Mapping[str, Any]) -> Journal:
        """Go on with the journal that is there.

        Raises:
            RefusedError: it belongs to a run with another key; the differing entries are named.
        """
        lines = _read(directory / JOURNAL_FILE)
        began = _key_in(lines)
        if began is None:
            return cls.begin(directory, key)
        wanted = json.loads(json.dumps(key))
        differing = sorted(
            name for name in began.keys() | wanted.keys() if began.get(name) != wanted.get(name)
        )
        if differing:
            name = differing[0]
            raise RefusedError(
                f"cannot resume: {', '.join(differing)} changed since the run began "
                f"({name}: {_short(began.get(name))} then, {_short(wanted.get(name))} now)",
                "run with the same settings, or start over with --overwrite",
            )
        journal = cls(directory, [ShardRecord.from_json(e["shard"]) for e in lines if "shard" in e])
        journal._append({"process": os.getpid()})
        return journal

    def add(self, shard: ShardRecord) -> None:
        """Record a shard whose file is already in place."""
        self._append({"shard": asdict(shard)})
        self.shards.append(shard)

    def remove(self) -> None:
        """The run is complete: the manifest now says all that the journal did."""
        self._path.unlink(missing_ok=True)
        sync_directory(self._path.parent)

    def _append(self, line: Mapping[str, Any]) -> None:
        # A crash can leave half a line; starting on a new one keeps it from spoiling this one.
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with disk_full_as_error(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole lines. A line that a crash cut short never counted, so it is passed over."""
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged", "start over with --overwrite") from error
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def _key_in(lines: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((line["key"] for line in lines if "key" in line), None)


def _owner(directory: Path) -> str:
    path = directory / JOURNAL_FILE
    lines = _read(path) if path.exists() else []
    owners = [line["process"] for line in lines if "process" in line]
    return str(owners[-1]) if owners else "(unknown)"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
