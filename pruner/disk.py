"""Room on the disk: refuses a run that would fill it. Knows sizes, not models."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import CapacityError


def check_disk(needed: int, out: Path, held: int) -> None:
    """Refuse a run whose `needed` bytes do not fit on the disk of `out`.

    `held` are the bytes of its own that `out` holds already, to go on with or to be removed.

    Raises:
        CapacityError: with both numbers.
    """
    free = shutil.disk_usage(out).free
    if needed > free + held:
        used = f", {held} used in it already" if held else ""
        raise CapacityError(
            f"the run needs {needed} bytes, {free} are free on the disk of {out}{used}"
        )


def training_bytes(kept: int) -> int:
    """Of the saved state of a training of so many weights, which tells no more than they do.

    Latents and two moments, fp32, and the state before while the next one is being written.
    """
    return 2 * 3 * 4 * kept


def handed_on_bytes(kept: int) -> int:
    """Of Adam's two moments, fp32, that one training leaves for another."""
    return 2 * 4 * kept
