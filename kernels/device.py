"""Where tensors are: the CPU, or a GPU that is there."""

from __future__ import annotations

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
