"""Reading and writing files so that no fault leaves half of one behind.

Writes go to a temporary file in the same directory, are flushed to the disk and then renamed, so a
reader sees the old file or the new one. JSON is bounded in size and depth before it is parsed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CapacityError, CheckpointError, UsageError

MAX_JSON_BYTES = 32 * 2**20
MAX_JSON_DEPTH = 64
_CHUNK_BYTES = 2**20
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[][{}]', re.DOTALL)


@contextmanager
def disk_full_as_error(path: Path) -> Iterator[None]:
    """Turn "no space left" into a CapacityError that names the file and the way on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CapacityError(
            f"the disk is full: {path} could not be written",
            "free some space and run the same command again, with --resume where it knows that",
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place of `path`.

    Raises:
        CapacityError: the disk is full. `path` is then as it was, and no temporary file remains.
    """
    with disk_full_as_error(path):
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(fd)
        temporary = Path(name)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def make_directory(directory: Path) -> None:
    """Make a directory and those above it, where they are missing.

    Raises:
        UsageError: it cannot be made, or is something else.
        CapacityError: the disk is full.
    """
    try:
        with disk_full_as_error(directory):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be made: {error.strerror}", "choose another directory"
        ) from error


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically, indented and with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def find_directory(path: str | Path) -> Path:
    """The model directory that a user's argument means.

    Raises:
        UsageError: it is a file, is missing, or looks like a hub id; the message says which.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise UsageError(f"{directory} is a file, not a model directory")
    if str(path).count("/") == 1 and not str(path).startswith((".", "/")):
        raise UsageError(
            f"{path} is no local directory; halfweave does not download from a hub",
            f"hf download {path} --local-dir MODEL, then give MODEL",
        )
    raise UsageError(f"{directory} does not exist")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size and depth.

    Raises:
        CheckpointError: missing, too large, too deep, not UTF-8, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is {size} bytes; at most {MAX_JSON_BYTES} are read")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if _depth(text) > MAX_JSON_DEPTH:
        raise CheckpointError(f"{path} is nested deeper than {MAX_JSON_DEPTH} levels")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings; cheaper and safer than parsing to find out."""
    deepest = depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
