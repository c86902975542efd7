"""How far a stored linear is from what it was, rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.formats import PackedLinear
from .methods.base import InputStatistics
from .rows import row_ranges


def stored_error(original: Tensor, stored: PackedLinear, fit: InputStatistics) -> float:
    """||(W - W') X||^2 / ||W X||^2 on the calibration tokens; 0 when the layer saw no signal.

    `original` is [N, K] of any float dtype. X are all tokens, or where the Hessian is used up those
    that were sampled.
    """
    lost = whole = 0.0
    for part in row_ranges(*original.shape):
        before = original[part].float()
        after = stored.rows(torch.arange(part.start, part.stop, device=original.device)).unpack()
        lost += _energy(before - after, fit)
        whole += _energy(before, fit)
    return lost / whole if whole > 0 else 0.0


def _energy(weight: Tensor, fit: InputStatistics) -> float:
    """||W X||^2 per token."""
    if fit.sample is None:
        return float(((weight @ fit.hessian) * weight).sum())
    return float((weight @ fit.sample.T).square().sum()) / len(fit.sample)
