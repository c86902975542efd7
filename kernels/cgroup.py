"""The control groups that this process is in: where containers keep their limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def groups(controller: str, root: Path = ROOT) -> Iterator[tuple[Path, bool]]:
    """Directories of the groups that may limit this process, its own first, then those above it.

    With each, whether it is of version 1. `root` is where /sys and /proc are looked for.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be the host's, and only what is mounted can be read.
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            yield base / group, bool(controllers)


def read(file: Path) -> str:
    """What a file of the system says, or nothing."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
