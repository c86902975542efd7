"""How much weight no cache of this machine holds."""

from __future__ import annotations

import os
from pathlib import Path

LEAST_BYTES = 128 * 2**20
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cold_bytes(root: Path = Path("/")) -> int:
    """Twice the last caches of all CPUs that this process may use, and `LEAST_BYTES` at least.

    Where the system does not tell its caches that least has to do.
    """
    caches: dict[tuple[int, str], int] = {}
    for cpu in _allowed():
        for index in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level = int((index / "level").read_text())
                shared = (index / "shared_cpu_list").read_text().strip()
                caches[level, shared] = _bytes((index / "size").read_text().strip())
            except (OSError, ValueError):
                continue
    last = max((level for level, _ in caches), default=0)
    return max(LEAST_BYTES, 2 * sum(size for (level, _), size in caches.items() if level == last))


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _bytes(text: str) -> int:
    """Of words such as 32768K."""
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text)
