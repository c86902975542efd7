"""Where tensors are: the CPU, or a GPU that is there; and what memory it has left."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from ..errors import UsageError


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


def available_memory_bytes(device: torch.device | None = None) -> int | None:
    """Memory that can be used without swapping, or None where the system does not say.

    The computer's, or that of a GPU, with what this process keeps of it for tensors to come.
    """
    if device is not None and device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


@cache
def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
