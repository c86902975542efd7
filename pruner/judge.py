"""How far a stored linear is from what it was, rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.formats import PackedLinear
from .methods.base import InputStatistics, Lost
from .rows import row_ranges


def lost(original: Tensor, stored: PackedLinear, fit: InputStatistics) -> Lost:
    """||(W - W') X||^2 of `original` W [N, K] of any float dtype, and of what is stored for it, W'.

    The tokens are all, or those that were sampled, where inputs are many: a product with their
    Hessian would take as long as the pruning.
    """
    parts = []
    for part in row_ranges(*original.shape):
        before = original[part].float()
        after = stored.rows(torch.arange(part.start, part.stop, device=original.device)).unpack()
        parts.append(Lost(_energy(before - after, fit), _energy(before, fit)))
    return Lost(sum(part.lost for part in parts), sum(part.whole for part in parts))


def _energy(weight: Tensor, fit: InputStatistics) -> float:
    """||W X||^2 per token."""
    if fit.sample is None or not len(fit.sample):  # no token may have reached an expert
        return float(((weight @ fit.hessian) * weight).sum())
    return float((weight @ fit.sample.T).square().sum()) / len(fit.sample)
