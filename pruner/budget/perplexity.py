"""Losses of a whole model on token windows, with one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import HalfweaveError
from ..source import Source
from ..stream import BlockStream
from .head import Head

# All tensors of a block by full name, every linear as a dense weight.
ReadBlock = Callable[[int], Mapping[str, Tensor]]


def window_losses(source: Source, windows: Tensor, read: ReadBlock) -> list[float]:
    """Summed negative log-likelihood of each window [n, length], all tokens but the first.

    `source` gives everything outside the blocks.

    Raises:
        HalfweaveError: the model's scores are not finite.
        CheckpointError: a tensor is missing or does not fit.
    """
    stream = BlockStream(source, windows)
    for index in range(source.block_count):
        stream.advance(stream.load_block(index, read(index)))
        stream.drop_block(index)
    head = Head(source)
    pairs = zip(stream.hidden, windows.to(source.device), strict=True)
    losses = [head.loss(hidden, tokens) for hidden, tokens in pairs]
    if not all(math.isfinite(loss) for loss in losses):
        raise HalfweaveError("the scores of a candidate model are not finite")
    return losses


@dataclass(frozen=True)
class Ratio:
    """Perplexity over the dense model's on the same tokens.

    `error` is the standard error of the ratio's logarithm, from how it differs between windows;
    zero with one window.
    """

    value: float
    error: float

    @classmethod
    def of(cls, losses: list[float], dense: list[float], length: int) -> Ratio:
        """From summed losses per window of `length` tokens."""
        paired = torch.tensor(losses, dtype=torch.float64) - torch.tensor(dense).double()
        each = paired / (length - 1)
        error = float(each.std() / math.sqrt(len(each))) if len(each) > 1 else 0.0
        return cls(to_ratio(float(each.mean())), error)


def to_ratio(loss: float) -> float:
    """A ratio of perplexities from a difference of losses per token; infinite if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
