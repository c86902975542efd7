"""How much memory a recovery takes, told before it starts. Knows sizes, not tensors."""

from __future__ import annotations

from math import prod

import torch

from ...errors import CapacityError
from ...kernels.device import available_memory_bytes
from ..source import Source
from .settings import Distillation

_INTERPRETER_BYTES = 700 * 2**20  # torch and transformers, imported
# fp32 weight, gradient, latent, two moments, one working copy; the mask; the parent's weight.
_BYTES_PER_WEIGHT = 6 * 4 + 1 + 4
# What a block keeps for the backward pass, in hidden and intermediate widths per position.
_KEPT_HIDDEN, _KEPT_INTERMEDIATE = 16, 5
_LOGITS_BYTES = 160 * 2**20
# What the parent's outputs may take in memory; windows beyond it are computed in every epoch.
MOST_TARGETS_BYTES = 2**30


def needed_bytes(source: Source, settings: Distillation, targets_bytes: int) -> int:
    """Peak memory of a run, an estimate from shapes alone.

    `targets_bytes` are those of the parent's outputs, MOST_TARGETS_BYTES at most.
    """
    linears = sum(
        prod(source.linear_shape(name))
        for index in range(source.block_count)
        for name in source.linear_names(index)
    )
    total = sum(prod(source.tensors.shape(name)) for name in source.tensors.names())
    first = source.linear_shape(source.linear_names(0)[0])
    widest = max(max(source.linear_shape(name)) for name in source.linear_names(0))
    positions = settings.windows_per_pass * settings.length
    per_position = _KEPT_HIDDEN * first[1] + _KEPT_INTERMEDIATE * widest
    activations = 4 * positions * per_position * source.block_count
    others = 2 * 4 * (total - linears)  # the student's and the parent's embeddings and heads
    weights = _BYTES_PER_WEIGHT * linears
    return _INTERPRETER_BYTES + weights + others + activations + targets_bytes + _LOGITS_BYTES


def check_memory(needed: int, device: torch.device) -> None:
    """Refuse a run that does not fit in the memory of `device`.

    Raises:
        CapacityError: with both numbers.
    """
    available = available_memory_bytes(device)
    if available is not None and needed > available:
        raise CapacityError(
            f"the recovery needs about {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available",
            "use a device with more (--device), or prune with --recover blocks, which trains one "
            "block at a time",
        )
