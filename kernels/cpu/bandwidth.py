"""How fast this machine reads what no cache holds: the roof over every matrix-vector product."""

from __future__ import annotations

import time

import torch

from .library import Library

_BYTES = 256 * 2**20  # beyond the last cache of most machines
_ROUNDS = 5


def read_bandwidth(library: Library) -> float:
    """Bytes a second that all threads of the library read together: the best of a few rounds.

    The fastest round is the one that neighbours disturbed least; it takes a tenth of a second.
    """
    buffer = torch.ones(_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        library.call("hw_read", library.pool, buffer.data_ptr(), _BYTES)
        seconds.append(time.perf_counter() - start)
    return _BYTES / min(seconds)
