"""Figures on the disk, under a key of all that decides them: what was measured once is kept.

A file's name holds a digest of its key, and the file the key itself, so figures of other settings
are never taken for these. The key has no version of halfweave in it: after a change of a method,
its rows are to be measured again (`quality.py --again`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfweave.files import write_json

DIGEST_CHARS = 12


@dataclass(frozen=True)
class Entry:
    """One set of figures: where it is, or will be, and what decides it."""

    path: Path
    key: Mapping[str, Any]

    def read(self) -> dict[str, Any] | None:
        """The figures, or None if they were not measured yet."""
        if not self.path.exists():
            return None
        stored = json.loads(self.path.read_text())
        if stored["key"] != self.key:
            raise ValueError(f"{self.path} holds the figures of another key")
        figures: dict[str, Any] = stored["figures"]
        return figures

    def write(self, figures: Mapping[str, Any]) -> None:
        """Keep the figures; a kill leaves either none or all of them."""
        write_json(self.path, {"key": self.key, "figures": figures})


def entry(folder: Path, name: str, kind: str, key: Mapping[str, Any]) -> Entry:
    """The entry of one kind of figures for one name."""
    return Entry(folder / f"{name}-{digest(key)}.{kind}.json", key)


def digest(key: Mapping[str, Any]) -> str:
    """A short name for a key, the same in any order of its fields."""
    text = json.dumps(key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]
