"""Shared memory of a few blocks of threads, with a record of who wrote and read which word when.

An epoch lasts from one barrier to the next. Within it a warp may not read what another wrote, nor
write what another wrote or read. Copies from global memory (cp.async) are in flight until they are
waited for: their words may be neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .numbers import Array, PTXError

_NOBODY, _SEVERAL = -1, -2
_PER_WORD = ("written", "in_flight", "write_epoch", "writer", "read_epoch", "reader")


@dataclass(frozen=True)
class Lanes:
    """Threads that access memory together: the block each is of, and its number in there."""

    blocks: Array
    threads: Array

    @property
    def warps(self) -> Array:
        """Each thread's warp in its block, one column."""
        return (self.threads // 32)[:, None]


class SharedMemory:
    """`size` bytes for each of `blocks`; `checks` turns the rules above on."""

    def __init__(self, blocks: int, size: int, checks: bool) -> None:
        words = -(-size // 4)
        self._size, self._checks, self._epoch = size, checks, 1
        self.bytes = np.zeros((blocks, 4 * words), np.uint8)
        self.written = np.zeros((blocks, words), bool)
        self.in_flight = np.zeros((blocks, words), np.int16)
        self.write_epoch = np.zeros((blocks, words), np.int32)
        self.writer = np.full((blocks, words), _NOBODY, np.int16)
        self.read_epoch = np.zeros((blocks, words), np.int32)
        self.reader = np.full((blocks, words), _NOBODY, np.int16)

    def only(self, blocks: Array) -> SharedMemory:
        """A copy for some of the blocks."""
        part = object.__new__(SharedMemory)
        part.__dict__.update(self.__dict__)
        for name in ("bytes", *_PER_WORD):
            setattr(part, name, getattr(self, name)[blocks])
        return part

    def barrier(self) -> None:
        """All threads of each block have come this far."""
        self._epoch += 1

    def load(self, offsets: Array, size: int, lanes: Lanes) -> Array:
        """`size` bytes at each lane's offset: uint8 [lanes, size].

        Raises:
            PTXError: out of bounds, in flight, never written, or another warp's of this epoch.
        """
        words, blocks = self._words(offsets, size), lanes.blocks[:, None]
        if self._checks:
            if self.in_flight[blocks, words].any():
                raise PTXError("shared read of data in flight: a wait for its copy is missing")
            if not self.written[blocks, words].all():
                raise PTXError("shared read of what was never written")
            fresh = self.write_epoch[blocks, words] == self._epoch
            if (fresh & (self.writer[blocks, words] != lanes.warps)).any():
                raise PTXError("shared race: a read after a write, without a barrier")
            again = self.read_epoch[blocks, words] == self._epoch
            other = again & (self.reader[blocks, words] != lanes.warps)
            self.reader[blocks, words] = np.where(other, _SEVERAL, lanes.warps)
            self.read_epoch[blocks, words] = self._epoch
        return self.bytes[blocks, offsets[:, None] + np.arange(size)]

    def store(self, offsets: Array, values: Array, lanes: Lanes) -> None:
        """Write each lane's bytes, uint8 [lanes, size].

        Raises:
            PTXError: out of bounds, or another warp wrote or read there in this epoch.
        """
        size = values.shape[1]
        words = self._checked_words(offsets, size, lanes)
        self._mark_written(words, lanes)
        self.bytes[lanes.blocks[:, None], offsets[:, None] + np.arange(size)] = values

    def begin_copy(self, offsets: Array, size: int, lanes: Lanes) -> None:
        """From here on the words are in flight.

        Raises:
            PTXError: as `store`, or they are in flight already.
        """
        words, blocks = self._checked_words(offsets, size, lanes), lanes.blocks[:, None]
        if self._checks and self.in_flight[blocks, words].any():
            raise PTXError("a copy to where another copy is in flight")
        self.in_flight[blocks, words] += 1

    def end_copy(self, offsets: Array, values: Array, lanes: Lanes) -> None:
        """The data has come, by the threads that copied it."""
        size = values.shape[1]
        words, blocks = self._words(offsets, size), lanes.blocks[:, None]
        self.in_flight[blocks, words] = 0
        self._mark_written(words, lanes)
        self.bytes[blocks, offsets[:, None] + np.arange(size)] = values

    def _words(self, offsets: Array, size: int) -> Array:
        if len(offsets) and (offsets.min() < 0 or offsets.max() + size > self._size):
            raise PTXError("shared access out of bounds")
        if np.any(offsets % min(size, 16)):
            raise PTXError(f"misaligned shared access of {size} bytes")
        return offsets[:, None] // 4 + np.arange(max(1, size // 4))

    def _checked_words(self, offsets: Array, size: int, lanes: Lanes) -> Array:
        words, blocks = self._words(offsets, size), lanes.blocks[:, None]
        if self._checks:
            read = self.read_epoch[blocks, words] == self._epoch
            if (read & (self.reader[blocks, words] != lanes.warps)).any():
                raise PTXError("shared race: a write after a read, without a barrier")
            fresh = self.write_epoch[blocks, words] == self._epoch
            if (fresh & (self.writer[blocks, words] != lanes.warps)).any():
                raise PTXError("shared race: a write after a write, without a barrier")
        return words

    def _mark_written(self, words: Array, lanes: Lanes) -> None:
        blocks = lanes.blocks[:, None]
        self.written[blocks, words] = True
        self.write_epoch[blocks, words] = self._epoch
        self.writer[blocks, words] = lanes.warps
