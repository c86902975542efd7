"""What memory there is for the heavy work, and what a GPU says when it is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import CapacityError


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


@contextmanager
def explained_memory() -> Iterator[None]:
    """Turns a GPU's running out of memory into a CapacityError that says what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"the GPU's memory is full: {str(error).splitlines()[0]}",
            "--resume goes on once other programs have left the GPU; --overwrite starts anew, with "
            "--device cpu or, where it was pruning, fewer windows (--calib-windows)",
        ) from error
