"""Activations on the disk where they are large: memory that the system may take back."""

from __future__ import annotations

import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CapacityError

SPILLED_FROM = 2**31  # bytes


def is_spilled(nbytes: int, device: torch.device) -> bool:
    """Whether so many activations lie in a file; a GPU's stay in its memory."""
    return nbytes >= SPILLED_FROM and device.type == "cpu"


def states(shape: tuple[int, ...], device: torch.device, directory: Path | None) -> Tensor:
    """fp32 zeros of `shape`; large ones in a mapped file of `directory`, that nobody else sees.

    The file has no name any more when it is returned, and goes with the tensor or the process.

    Raises:
        CapacityError: the disk is full.
    """
    if directory is None or not is_spilled(4 * prod(shape), device):
        return torch.zeros(shape, device=device)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".activations.", suffix=".tmp") as file:
        try:
            _reserve(file.fileno(), 4 * prod(shape))
        except OSError as error:
            raise CapacityError(
                f"no room for {4 * prod(shape)} bytes of activations on the disk of {directory}: "
                f"{error}",
                "use fewer or shorter calibration windows",
            ) from error
        flat = torch.from_file(file.name, shared=True, size=prod(shape), dtype=torch.float32)
    return flat.view(shape)


def _reserve(fd: int, nbytes: int) -> None:
    """Take the room now: a full disk would end the process where a page is written."""
    os.posix_fallocate(fd, 0, nbytes)
