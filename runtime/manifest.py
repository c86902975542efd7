"""The manifest of a directory that halfweave made: which files belong to it, and their hashes.

A hash guards against damage on the way, not against a forger, who would rewrite the manifest too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RefusedError
from ..files import read_json, sha256_file
from ..kernels.cpu.cores import granted_cores
from ..kernels.schema import FORMAT_VERSION, MANIFEST_FILE

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file, as it was when the manifest was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`halfweave.json`: the files it vouches for, and the whole document as it was read."""

    files: Mapping[str, FileRecord]
    document: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check the manifest itself, not yet the files that it lists.

        Raises:
            RefusedError: a newer format version, or a name that leads out of the directory.
            CheckpointError: anything else that is not as specified.
        """
        path = directory / MANIFEST_FILE
        document = read_json(path)
        version = document.get("format_version")
        if type(version) is not int or version < 1:
            raise CheckpointError(f"{path}: format_version is no number")
        if version > FORMAT_VERSION:
            raise RefusedError(
                f"{path}: format version {version} is newer than {FORMAT_VERSION}",
                "install a newer halfweave",
            )
        files = document.get("files")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{path} lists no files")
        for name in ("recipe", "provenance", "linears"):
            if not isinstance(document.get(name, {}), dict):
                raise CheckpointError(f"{path}: {name} is no object")
        if not all(isinstance(each, dict) for each in document.get("linears", {}).values()):
            raise CheckpointError(f"{path}: an entry of linears is no object")
        return cls({name: _record(path, name, entry) for name, entry in files.items()}, document)

    def check_sizes(self, directory: Path) -> None:
        """Raise CheckpointError unless every listed file is there with its size."""
        for name, record in self.files.items():
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing", "copy the file again")
            size = path.stat().st_size
            if size != record.bytes:
                raise CheckpointError(
                    f"{path}: expected {record.bytes} bytes, found {size}",
                    "the file is cut off or was replaced: copy it again",
                )

    def check_hashes(self, directory: Path) -> None:
        """Raise CheckpointError unless every listed file has its SHA-256, on all cores."""
        paths = [directory / name for name in self.files]
        with ThreadPoolExecutor(granted_cores()) as threads:
            for path, digest in zip(paths, threads.map(sha256_file, paths), strict=True):
                if digest != self.files[path.name].sha256:
                    raise CheckpointError(
                        f"{path} is damaged: its SHA-256 is not the one in {MANIFEST_FILE}",
                        "copy the file again, or prune again",
                    )


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    if Path(name).name != name or name in ("", ".", ".."):
        raise RefusedError(f"{path}: {name[:80]!r} is not a file of this directory")
    size = entry.get("bytes") if isinstance(entry, dict) else None
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    if type(size) is not int or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise CheckpointError(f"{path}: the entry of {name[:80]!r} has no bytes and sha256")
    return FileRecord(size, digest)
