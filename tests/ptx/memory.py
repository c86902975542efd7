"""Global memory: a few arrays, with guarded space between them."""

from __future__ import annotations

import numpy as np

from .numbers import Array, PTXError

BASE = 0x7000_0000_0000
_GUARD = 4096  # bytes between two arrays, in which nothing may be touched
_ALIGNMENT = 256


class GlobalMemory:
    """Arrays at addresses. Every access is checked for its bounds and its alignment."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self._valid = np.zeros(0, bool)
        self._next = _GUARD
        self._arrays: dict[int, Array] = {}

    def put(self, array: Array) -> int:
        """Copy an array into memory; its address."""
        array = np.ascontiguousarray(array)
        start, size = self._next, array.nbytes
        self._next = (start + size + _GUARD + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        grown = self._next + _GUARD - len(self.bytes)
        self.bytes = np.concatenate([self.bytes, np.zeros(grown, np.uint8)])
        self._valid = np.concatenate([self._valid, np.zeros(grown, bool)])
        self.bytes[start : start + size] = array.reshape(-1).view(np.uint8)
        self._valid[start : start + size] = True
        self._arrays[BASE + start] = array
        return BASE + start

    def get(self, address: int) -> Array:
        """A copy of what is now in an array that `put` gave this address."""
        array, start = self._arrays[address], address - BASE
        found = self.bytes[start : start + array.nbytes].view(array.dtype)
        return found.reshape(array.shape).copy()

    def indices(self, addresses: Array, size: int) -> Array:
        """Positions in `bytes` [accesses, size] of `size` bytes at each address.

        Raises:
            PTXError: one is not aligned to its size, or not within an array.
        """
        starts = (addresses - np.uint64(BASE)).astype(np.int64)
        if np.any(starts % min(size, 16)):
            raise PTXError(f"misaligned global access of {size} bytes")
        found = starts[:, None] + np.arange(size)
        if found.size and (
            found.min() < 0 or found.max() >= len(self.bytes) or not self._valid[found].all()
        ):
            raise PTXError("global access out of bounds")
        return found
