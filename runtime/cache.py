"""Keys and values of one sequence, for all layers, growing in steps as the sequence does."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CapacityError

_STEP = 256  # positions added at a time


def length_with(length: int, count: int, limit: int) -> int:
    """Positions of a sequence once `count` more are there.

    Raises:
        CapacityError: that is more than the limit.
    """
    if length + count > limit:
        raise CapacityError(f"{length + count} positions, the model has {limit}")
    return length + count


class SequenceCache:
    """Attention memory of one sequence.

    `length` positions are filled; storage is [layers, kv_heads, capacity, head_dim].
    """

    def __init__(
        self, shape: tuple[int, int, int], limit: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is (layers, kv_heads, head_dim); `limit` the most positions there may ever be."""
        layers, heads, dim = shape
        self._limit = limit
        self.length = 0
        self._keys = torch.empty(layers, heads, 0, dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)

    def reserve(self, count: int) -> None:
        """Make room for `count` more positions.

        Raises:
            CapacityError: that would be more than the limit.
        """
        needed = length_with(self.length, count, self._limit)
        if needed > self._keys.shape[2]:
            capacity = min(self._limit, -(-needed // _STEP) * _STEP)
            self._keys = self._grown(self._keys, capacity)
            self._values = self._grown(self._values, capacity)

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        layers, heads, _, dim = old.shape
        new = old.new_empty(layers, heads, capacity, dim)
        new[:, :, : self.length] = old[:, :, : self.length]
        return new

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [kv_heads, count, head_dim] behind `length`; returns all keys and values so far.

        `advance` is called once, after every layer has stored.
        """
        end = self.length + keys.shape[1]
        self._keys[layer, :, self.length : end] = keys
        self._values[layer, :, self.length : end] = values
        return self._keys[layer, :, :end], self._values[layer, :, :end]

    def advance(self, count: int) -> None:
        """The stored positions of all layers now count."""
        self.length += count
