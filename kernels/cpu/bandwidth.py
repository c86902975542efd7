"""How fast this machine reads what no cache holds: the roof over every matrix-vector product."""

from __future__ import annotations

import time
from ctypes import byref, c_uint64

import torch
from torch import Tensor

from .library import Library, address
from .room import Room

_BYTES = 256 * 2**20  # beyond the last cache of most machines
_ROUNDS = 5


def read_bandwidth(library: Library) -> float:
    """Bytes a second that all threads of the library read together: the best of a few rounds.

    The fastest round is the one that neighbours disturbed least. What is read lies where weights
    do, on large pages: on small ones a Zen 4 reads 0.6 of it.
    """
    buffer = Room().take(_BYTES).fill_(1)
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        read_sum(library, buffer)
        seconds.append(time.perf_counter() - start)
    return _BYTES / min(seconds)


def read_sum(library: Library, data: Tensor) -> int:
    """Read uint8 data, a multiple of 128 bytes: the sum of its 64-bit words, mod 2^64."""
    total, start = c_uint64(), address(data, "data", torch.uint8, data.nbytes)
    library.call("hw_read", library.pool, start, data.nbytes, byref(total))
    return total.value
