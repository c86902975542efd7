"""What an access costs a GPU, and what the same bytes would cost at best."""

from __future__ import annotations

import numpy as np

from .numbers import Array

_BANKS, _SECTOR = 32, 32


def sectors(addresses: Array, size: int, warps: Array) -> tuple[int, int]:
    """Sectors of 32 bytes of global memory that warps touch, and the least for so many bytes."""
    touched = least = 0
    step = min(size, 4)
    for warp in np.unique(warps):
        own = addresses[warps == warp]
        pieces = np.unique((own[:, None] + np.arange(0, size, step).astype(own.dtype)).reshape(-1))
        touched += len(np.unique(pieces // _SECTOR))
        least += -(-len(pieces) * step // _SECTOR)
    return touched, least


def wavefronts(offsets: Array, size: int, warps: Array) -> tuple[int, int]:
    """Turns that shared memory takes for warps' requests, and the least for so many words.

    Lanes go in groups of 128 bytes; a group takes as many turns as distinct words share a bank.
    """
    turns = least = 0
    lanes = max(1, min(32, 128 // size))
    for warp in np.unique(warps):
        own = offsets[warps == warp]
        for start in range(0, len(own), lanes):
            starts = own[start : start + lanes, None]
            words = np.unique((starts + np.arange(0, max(size, 1), 4)).reshape(-1) // 4)
            turns += int(np.bincount(words % _BANKS, minlength=_BANKS).max())
            least += -(-len(words) // _BANKS)
    return turns, least
