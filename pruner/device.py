"""What a GPU says when its memory is full, in words that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import CapacityError


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
