"""The sets of masks a pattern allows, and the way to the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import keep_above_quantile, keep_n_of_m
from ..recipe import Pattern


def choose_support(score: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the highest scores [N, K] under `pattern`; exactly M of N for N:M, whatever ties."""
    if pattern.is_dense:
        return torch.ones_like(score, dtype=torch.bool)
    if pattern.of:
        return keep_n_of_m(score, pattern.kept, pattern.of)
    return keep_above_quantile(score, pattern.fraction)


def quick_support(score: Tensor, pattern: Pattern) -> Tensor:
    """As `choose_support`, but fast, for the inner loop: ties may keep more of a group of four.

    The second largest of four by five minima and maxima costs a tenth of a sort.
    """
    if not pattern.is_24:
        return choose_support(score, pattern)
    a, b, c, d = score.view(score.shape[0], -1, 4).unbind(-1)
    high = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.maximum(high, low)
    return score >= second.repeat_interleave(4, dim=1)
