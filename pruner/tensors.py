"""Named tensors put on the disk whole or not at all, a full disk told from other faults."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ..files import write_atomically

_DISK_FULL = (f"os error {errno.ENOSPC})", f"os error {errno.EDQUOT})")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        CapacityError: the disk is full; `path` is as it was.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(contiguous, temporary, metadata=dict(metadata))
        except safetensors.SafetensorError as error:
            if str(error).endswith(_DISK_FULL):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise

    write_atomically(path, write)
