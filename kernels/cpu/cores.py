"""How many threads this process should compute with: cores that it was granted, not those it sees.

The kernels' threads wait for each other many times a token, so one thread too many costs more than
one too few: a thread that shares its core, or is throttled, keeps all others waiting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..cgroup import ROOT, groups, read


def granted_cores(root: Path = ROOT) -> int:
    """Physical cores that the affinity mask and the control group's CPU quota leave; at least 1.

    `root` is where /sys and /proc are looked for. What they do not tell is taken as no limit.
    """
    allowed = _allowed()
    cores = {_siblings(root, cpu) for cpu in allowed}
    return max(1, min([len(cores), *(int(quota) for quota in _quotas(root))]))


def one_cpu_a_core(root: Path = ROOT) -> list[int]:
    """The first allowed logical CPU of every physical core that the affinity mask leaves."""
    first: dict[str, int] = {}
    for cpu in sorted(_allowed()):
        first.setdefault(_siblings(root, cpu), cpu)
    return list(first.values())


def _allowed() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not on macOS
        return set(range(os.cpu_count() or 1))


def _siblings(root: Path, cpu: int) -> str:
    """Which logical CPUs share a core with this one, as the kernel writes it."""
    folder = root / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology"
    return read(folder / "thread_siblings_list") or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in CPUs, of the control group and of those above it."""
    for group, old in groups("cpu", root):
        quota = (_old_quota if old else _quota)(group)
        if quota is not None:
            yield quota


def _quota(group: Path) -> float | None:
    quota, _, period = read(group / "cpu.max").partition(" ")
    return float(quota) / float(period) if quota.isdigit() and period.isdigit() else None


def _old_quota(group: Path) -> float | None:
    quota, period = (read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return float(quota) / float(period) if quota.isdigit() and period.isdigit() else None
