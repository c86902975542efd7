"""Memory for weights, in large pages where the system has them.

A token reads every weight from end to end. On pages of 4 KiB the processor looks up where the next
one is more often than it can hide, all the more in a virtual machine; docs/cpu.md has figures.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_LINE = 64
_PAGE = 2 * 2**20
_PIECE = 64 * 2**20  # what is not touched of it takes no memory


class Room:
    """Gives memory from large pieces; one is free again when nothing that lies in it is left."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Uninitialised uint8 [size] that begins on a line of the cache."""
        lines = -(-size // _LINE) * _LINE
        if lines > len(self._left):
            self._left = _piece(max(lines, _PIECE))
        taken, self._left = self._left[:size], self._left[lines:]
        return taken


def _piece(size: int) -> Tensor:
    try:
        memory = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # not Linux, or a kernel without them
        return aligned_bytes(size)
    return _from(torch.frombuffer(memory, dtype=torch.uint8), _PAGE, size)


def aligned_bytes(size: int) -> Tensor:
    """Uninitialised uint8 [size] that begins on a line of the cache."""
    return _from(torch.empty(size + _LINE, dtype=torch.uint8), _LINE, size)


def _from(buffer: Tensor, multiple: int, size: int) -> Tensor:
    """The first `size` bytes that begin at a multiple."""
    start = -buffer.data_ptr() % multiple
    return buffer[start : start + size]
