"""Where tensors are: the CPU, or a GPU that is there; and what memory it has left."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from ..errors import UsageError
from .cgroup import ROOT, groups, read

_NUMBERS = (("family", "cpu family"), ("model", "model"))


def parse_device(name: str) -> torch.device:
    """The device of a name such as cpu, cuda or cuda:1.

    Raises:
        UsageError: it is neither, or this machine, or this build of torch, has no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is none of cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is none of cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UsageError(
            f"device {name!r} is not there: torch {torch.__version__} sees {count} GPUs",
            "leave --device out, or install a build of torch for your GPU",
        )
    return device


def available_memory_bytes(device: torch.device | None = None, root: Path = ROOT) -> int | None:
    """Memory that can be used without swapping, or None where the system does not say.

    The computer's, or what control groups leave of it; or that of a GPU, with what this process
    keeps of it for tensors to come. `root` is where /sys and /proc are looked for.
    """
    if device is not None and device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    lines = read(root / "proc/meminfo").splitlines()
    whole = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*whole, *_left_by_groups(root)], default=None)


def whole_memory_bytes(root: Path = ROOT) -> int:
    """The computer's memory, or the least that a control group limits it to."""
    computer = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([computer, *(limit for limit, _, _ in _group_limits(root))])


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group leaves of its memory, if it has a limit; cached files make room."""
    for limit, group, old in _group_limits(root):
        used = read(group / f"memory.{'usage_in_bytes' if old else 'current'}")
        if used.isdigit():
            stat = dict(line.split()[:2] for line in read(group / "memory.stat").splitlines())
            cached = int(stat.get("total_inactive_file" if old else "inactive_file", 0))
            yield max(0, limit - int(used) + cached)


def _group_limits(root: Path) -> Iterator[tuple[int, Path, bool]]:
    """Limits of memory in bytes, each with its control group and whether that is of version 1."""
    for group, old in groups("memory", root):
        limit = read(group / f"memory.{'limit_in_bytes' if old else 'max'}")
        if limit.isdigit():
            yield int(limit), group, old


@cache
def cpu_model(root: Path = ROOT) -> str:
    """What the processor calls itself; virtual ones share a name, so its numbers as well."""
    facts: dict[str, str] = {}
    for line in read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    numbers = [f"{word} {facts[name]}" for word, name in _NUMBERS if name in facts]
    return f"{facts['model name']} ({', '.join(numbers)})" if numbers else facts["model name"]
